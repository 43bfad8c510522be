//! The file that holds the configuration accepted last.
//!
//! A magic line, then length-delimited delta responses, one per type. Written beside and renamed, so
//! that a crash leaves the old or the new file.

use std::{
    collections::BTreeMap,
    fs, io,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use prost::Message as _;

use crate::pb;

const MAGIC: &[u8] = b"flotilla-xds-1\n";
/// A larger file is not ours.
const MAX_FILE: u64 = 256 * 1024 * 1024;

pub(super) fn save(
    path: &Path,
    types: &BTreeMap<&'static str, BTreeMap<String, pb::Resource>>,
) -> io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    for (type_url, resources) in types {
        let response = pb::DeltaDiscoveryResponse {
            type_url: (*type_url).to_owned(),
            // What holds for a time only has no place in a file.
            resources: resources.values().filter(|r| r.ttl.is_none()).cloned().collect(),
            ..Default::default()
        };
        response.encode_length_delimited(&mut bytes).map_err(io::Error::other)?;
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let tmp = path.with_extension("tmp");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&tmp, path)
}

/// `None` if there is no file.
pub(super) fn load(path: &Path) -> io::Result<Option<BTreeMap<String, Vec<pb::Resource>>>> {
    let file = match fs::File::open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("not a kept configuration"))?;
    let mut types = BTreeMap::new();
    while !rest.is_empty() {
        let r = pb::DeltaDiscoveryResponse::decode_length_delimited(&mut rest)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        types.insert(r.type_url, r.resources);
    }
    Ok(Some(types))
}
