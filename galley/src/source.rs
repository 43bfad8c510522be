//! Directories of YAML and JSON files.
//!
//! Every reading is complete: what it does not contain does not exist. Change notifications only say
//! *when* to read. They are lossy (queue overflows, file systems without them, a directory replaced
//! by renaming a symbolic link), so the source is also polled; a poll is one `stat` per file.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _, event::AccessKind};
use tokio::sync::mpsc;

use crate::{document::MAX_FILE_BYTES, store::SourceFile};

/// Directories below a configured one.
const MAX_DEPTH: usize = 16;
/// Files of all directories.
const MAX_FILES: usize = 20_000;

/// Whether a file holds configuration, by its name.
pub(crate) fn is_config_file(path: &Path) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// What a file looked like when it was read; an equal stamp means equal content.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    #[cfg(unix)]
    inode: (u64, u64),
}

impl Stamp {
    fn of(m: &fs::Metadata) -> Self {
        #[cfg(unix)]
        use std::os::unix::fs::MetadataExt as _;
        Self {
            modified: m.modified().ok(),
            len: m.len(),
            #[cfg(unix)]
            inode: (m.dev(), m.ino()),
        }
    }
}

/// Reads directories, remembering what it has read.
#[derive(Debug, Default)]
pub(crate) struct DirectorySource {
    dirs: Vec<PathBuf>,
    /// By path as text: to compare or hash paths part by part costs several times as much, for each file and reading.
    cache: HashMap<OsString, (Stamp, Arc<Vec<u8>>)>,
}

impl DirectorySource {
    pub(crate) fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, cache: HashMap::new() }
    }

    /// Reads everything; blocking. An unreadable file or directory is an entry with its error.
    pub(crate) fn read(&mut self) -> Vec<SourceFile> {
        let mut found = Vec::new();
        let mut visited = HashSet::new();
        for dir in &self.dirs {
            walk(dir, 0, &mut visited, &mut found);
        }
        found.sort_by(|a, b| a.0.as_os_str().cmp(b.0.as_os_str()));
        found.dedup_by(|a, b| a.0.as_os_str() == b.0.as_os_str());
        let mut cache = HashMap::with_capacity(found.len());
        let mut out = Vec::with_capacity(found.len());
        if found.len() > MAX_FILES {
            let reason = format!("more than {MAX_FILES} files");
            let path = self.dirs.first().map(|d| d.display().to_string()).unwrap_or_default();
            return vec![SourceFile { path, content: Err(reason), modified: 0 }];
        }
        for (path, listed) in found {
            let shown = path.display().to_string();
            let read = listed.and_then(|meta| {
                let stamp = Stamp::of(&meta);
                let content = match self.cache.get(path.as_os_str()) {
                    Some((old, content)) if *old == stamp => content.clone(),
                    _ => Arc::new(read_bounded(&path)?),
                };
                Ok((stamp, content))
            });
            out.push(match read {
                Ok((stamp, content)) => {
                    let modified = stamp.modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                    cache.insert(path.into_os_string(), (stamp, content.clone()));
                    SourceFile {
                        path: shown,
                        content: Ok(content),
                        modified: modified.map_or(0, |d| d.as_secs()),
                    }
                }
                Err(e) => {
                    SourceFile { path: shown, content: Err(format!("cannot be read: {e}")), modified: 0 }
                }
            });
        }
        self.cache = cache;
        out
    }
}

/// Reads a file of at most one byte more than is allowed, so that the parser can name the limit.
pub(crate) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(path)?.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Lists configuration files below `dir`. Names that start with a dot are skipped: editors' own
/// files, and the real directories behind a mounted ConfigMap's links.
fn walk(
    dir: &Path,
    depth: usize,
    visited: &mut HashSet<PathBuf>,
    out: &mut Vec<(PathBuf, io::Result<fs::Metadata>)>,
) {
    if depth > MAX_DEPTH {
        out.push((dir.to_owned(), Err(io::Error::other("directories are nested too deep"))));
        return;
    }
    if out.len() > MAX_FILES {
        return;
    }
    // A link that leads back up would be walked for ever.
    match dir.canonicalize() {
        Ok(real) => {
            if !visited.insert(real) {
                return;
            }
        }
        Err(e) => {
            out.push((dir.to_owned(), Err(e)));
            return;
        }
    }
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => {
            out.push((dir.to_owned(), Err(e)));
            return;
        }
    };
    for entry in entries {
        let entry = match entry {
            Ok(e) => e,
            Err(e) => {
                out.push((dir.to_owned(), Err(e)));
                continue;
            }
        };
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        match fs::metadata(&path) {
            Ok(m) if m.is_dir() => walk(&path, depth + 1, visited, out),
            // Neither pipes nor devices: reading them could wait for ever.
            Ok(m) if m.is_file() && is_config_file(&path) => out.push((path, Ok(m))),
            Ok(_) => {}
            // Removed since it was listed; a dangling link is a mistake worth telling.
            Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(&path).is_err() => {}
            Err(e) if is_config_file(&path) => out.push((path, Err(e))),
            Err(_) => {}
        }
    }
}

/// Lists the configuration files of a directory given on the command line.
pub(crate) fn list(dir: &Path) -> Vec<(PathBuf, io::Result<()>)> {
    let mut out = Vec::new();
    walk(dir, 0, &mut HashSet::new(), &mut out);
    out.sort_by(|a, b| a.0.cmp(&b.0));
    out.into_iter().map(|(path, listed)| (path, listed.map(drop))).collect()
}

/// Says when a directory may have changed. Capacity one: any number of events is one reading.
pub(crate) struct Notifications {
    pub(crate) events: mpsc::Receiver<()>,
    _watcher: Option<RecommendedWatcher>,
}

impl Notifications {
    pub(crate) fn watch(dirs: &[PathBuf]) -> Self {
        let (tx, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |e: notify::Result<notify::Event>| {
            let relevant = match &e {
                // Our own reading is an access as well.
                Ok(e) => match e.kind {
                    EventKind::Access(AccessKind::Close(notify::event::AccessMode::Write)) => true,
                    EventKind::Access(_) => false,
                    _ => true,
                },
                Err(_) => true,
            };
            if relevant {
                // Full means that a reading is due already.
                let _ = tx.try_send(());
            }
        });
        let mut watcher = match watcher {
            Ok(w) => Some(w),
            Err(e) => {
                tracing::warn!(error = %e, "no change notifications; configuration is polled only");
                None
            }
        };
        if let Some(w) = &mut watcher {
            for dir in dirs {
                // The parent sees the directory itself being replaced.
                let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                for (path, mode) in
                    [(dir.as_path(), RecursiveMode::Recursive), (parent, RecursiveMode::NonRecursive)]
                {
                    if let Err(e) = w.watch(path, mode) {
                        tracing::debug!(path = %path.display(), error = %e, "no change notifications; polled only");
                    }
                }
            }
        }
        Self { events, _watcher: watcher }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(files: &[SourceFile], root: &Path) -> Vec<String> {
        files.iter().map(|f| Path::new(&f.path).strip_prefix(root).unwrap().display().to_string()).collect()
    }

    #[test]
    fn directories_are_read_recursively_and_completely() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        fs::create_dir_all(root.join("sub/deep")).unwrap();
        fs::create_dir_all(root.join(".hidden")).unwrap();
        for f in ["b.yaml", "a.YML", "sub/deep/c.json", "readme.md", ".hidden/d.yaml", ".swp.yaml"] {
            fs::write(root.join(f), f).unwrap();
        }
        std::os::unix::fs::symlink(root, root.join("sub/loop")).unwrap();
        std::os::unix::fs::symlink(root.join("nowhere"), root.join("dangling.yaml")).unwrap();
        let mut s = DirectorySource::new(vec![root.to_owned()]);
        let files = s.read();
        assert_eq!(paths(&files, root), ["a.YML", "b.yaml", "dangling.yaml", "sub/deep/c.json"]);
        assert!(files[2].content.is_err());
        assert!(files[1].modified > 0);
        fs::remove_file(root.join("b.yaml")).unwrap();
        assert_eq!(s.read().len(), 3);
    }

    #[test]
    fn unchanged_files_are_not_read_again_and_changed_ones_are() {
        let tmp = tempfile::tempdir().unwrap();
        let f = tmp.path().join("a.yaml");
        fs::write(&f, "one").unwrap();
        let mut s = DirectorySource::new(vec![tmp.path().to_owned()]);
        let content = |files: Vec<SourceFile>| files[0].content.clone().unwrap();
        let first = content(s.read());
        assert!(Arc::ptr_eq(&first, &content(s.read())));
        fs::write(&f, "other").unwrap();
        assert_eq!(*content(s.read()), b"other");
    }

    #[test]
    fn a_directory_behind_a_link_can_be_swapped() {
        let tmp = tempfile::tempdir().unwrap();
        for v in ["v1", "v2"] {
            fs::create_dir(tmp.path().join(v)).unwrap();
            fs::write(tmp.path().join(v).join("a.yaml"), v).unwrap();
        }
        let link = tmp.path().join("current");
        std::os::unix::fs::symlink("v1", &link).unwrap();
        let mut s = DirectorySource::new(vec![link.clone()]);
        assert_eq!(*s.read()[0].content.clone().unwrap(), b"v1");
        let staged = tmp.path().join("staged");
        std::os::unix::fs::symlink("v2", &staged).unwrap();
        fs::rename(&staged, &link).unwrap();
        assert_eq!(*s.read()[0].content.clone().unwrap(), b"v2");
        fs::remove_file(&link).unwrap();
        assert!(s.read()[0].content.is_err(), "a missing directory is an error, not an empty one");
    }
}
