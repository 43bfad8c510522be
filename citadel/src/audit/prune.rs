//! Which files of the log are to be removed.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::Path,
    time::{Duration, SystemTime},
};

use super::{ASIDE, Entry, Event, Proof, at, files, seconds, sha256};

/// Removes the oldest files of those that were put aside while there are more than `keep`, and nothing was written to them
/// within `young`. Answers with what has to be said of it. What cannot be removed stays: the log goes on.
pub(super) fn prune(dir: &Path, keep: usize, young: Duration) -> Vec<Event> {
    let mut out = Vec::new();
    loop {
        match oldest(dir, keep, young) {
            Ok(Some(mut said)) => {
                // Only how far the last of them went.
                out.retain(|e| !matches!(e, Event::Removed { .. }));
                out.append(&mut said);
            }
            Ok(None) => return out,
            Err(error) => {
                tracing::warn!(%error, "an old file of the audit log was not removed");
                return out;
            }
        }
    }
}

fn oldest(dir: &Path, keep: usize, young: Duration) -> io::Result<Option<Vec<Event>>> {
    let mut aside = files(dir)?;
    aside.retain(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(ASIDE)));
    let Some(path) = aside.first().filter(|_| aside.len() > keep) else { return Ok(None) };
    let changed = fs::metadata(path).and_then(|m| m.modified()).map_err(at(path))?;
    if SystemTime::now().duration_since(changed).is_ok_and(|age| age <= young) {
        return Ok(None);
    }
    let now = seconds(SystemTime::now());
    let mut out = Vec::new();
    let (mut through, mut head) = (0, String::new());
    for line in BufReader::new(File::open(path).map_err(at(path))?).lines() {
        let line = line.map_err(at(path))?;
        let Ok(entry) = serde_json::from_str::<Entry>(&line) else { continue };
        (through, head) = (entry.number, sha256(line.as_bytes()));
        if let Event::Intermediate { serial, cluster, key, not_after, .. } = entry.event
            && not_after > now
        {
            let proof = Proof::of("still valid, from lines that were removed");
            out.push(Event::Intermediate { serial, cluster, proof, key, not_after });
        }
    }
    fs::remove_file(path).map_err(at(path))?;
    tracing::info!(target: "audit", through, "removed the oldest file of the audit log");
    out.push(Event::Removed { through, head });
    Ok(Some(out))
}
