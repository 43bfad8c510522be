//! `flotilla validate`: files in, verdicts out, nothing applied.

use std::{collections::BTreeSet, io, io::Read as _, path::PathBuf, sync::Arc};

use mesh_xds::mcp;

use crate::{
    document::MAX_FILE_BYTES,
    galley,
    report::DocumentReport,
    source,
    store::{Hosts, SourceFile, Store},
    template::PodTemplate,
};

/// Verdicts on files, and whether all of them could be read.
#[derive(Debug)]
pub struct Validation {
    /// One per document, and one per file that could not be read.
    pub reports: Vec<DocumentReport>,
    /// Whether some file could not be read.
    pub unreadable: bool,
}

impl Validation {
    /// 0: all documents are valid; 1: some are not; 2: some file could not be read.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.unreadable { 2 } else { u8::from(self.reports.iter().any(|r| !r.valid)) }
    }
}

/// Validates files and directories; the path `-` is `stdin`.
///
/// Documents are checked on their own and for duplicates among the given ones. References to hosts
/// that the given documents do not define are warnings here, since the rest of the mesh is not
/// known; a running galley decides about them.
#[must_use]
pub fn validate_files(paths: &[PathBuf], stdin: &mut dyn io::Read) -> Validation {
    let files = read_files(paths, stdin);
    let unreadable = files.iter().any(|f| f.content.is_err());

    let order: Vec<String> = files.iter().map(|f| f.path.clone()).collect();
    let mut store = Store::new(crate::DEFAULT_NAMESPACE);
    store.update(&files, Hosts::Unknown);
    let mut reports = verdicts(&store);
    reports.sort_by_key(|r| (order.iter().position(|p| *p == r.file), r.document));
    Validation { reports, unreadable }
}

/// Documents of files as other components would get them from a galley, and what was not taken over.
#[derive(Debug)]
pub struct Loaded {
    /// What applies.
    pub documents: mcp::ConfigState,
    /// Verdicts, of which the invalid ones are not among the documents.
    pub validation: Validation,
    /// What makes pods, such as Deployments: no configuration of the mesh, and yet it says which workloads there will be.
    pub templates: Vec<PodTemplate>,
}

/// Reads files and directories as a galley that starts with them would; the path `-` is `stdin`.
///
/// References to hosts that nothing defines are warnings, as in [`validate_files`].
#[must_use]
pub fn load_files(paths: &[PathBuf], stdin: &mut dyn io::Read) -> Loaded {
    let files = read_files(paths, stdin);
    let unreadable = files.iter().any(|f| f.content.is_err());
    let mut store = Store::new(crate::DEFAULT_NAMESPACE);
    store.update(&files, Hosts::Unknown);
    let documents = galley::by_type(store.documents().map(|(k, d)| (k, &**d)))
        .into_iter()
        .map(|(t, all)| (t, all.into_iter().map(|(n, d)| (n, Arc::new(d))).collect()))
        .collect();
    let documents = mcp::ConfigState { documents, ..mcp::ConfigState::default() };
    let parsed = store.parsed();
    let ignored = parsed.iter().flat_map(|p| p.iter()).filter(|p| p.ignored);
    let templates = ignored.filter_map(PodTemplate::read).collect();
    Loaded { documents, validation: Validation { reports: verdicts(&store), unreadable }, templates }
}

fn verdicts(store: &Store) -> Vec<DocumentReport> {
    store.reports().map(|r| (**r).clone()).collect()
}

/// Files in the order they are given, directories by their contents; the path `-` is `stdin`.
pub(crate) fn read_files(paths: &[PathBuf], stdin: &mut dyn io::Read) -> Vec<SourceFile> {
    let mut files: Vec<SourceFile> = Vec::new();
    for path in paths {
        let listed = if path.as_os_str() == "-" {
            let mut content = Vec::new();
            let read = io::Read::take(&mut *stdin, MAX_FILE_BYTES as u64 + 1).read_to_end(&mut content);
            files.push(file("-".into(), read.map(|_| content)));
            continue;
        } else if path.is_dir() {
            source::list(path)
        } else {
            vec![(path.clone(), Ok(()))]
        };
        for (path, listed) in listed {
            files.push(file(path.display().to_string(), listed.and_then(|()| source::read_bounded(&path))));
        }
    }
    let mut seen = BTreeSet::new();
    files.retain(|f| seen.insert(f.path.clone()));
    files
}

fn file(path: String, content: io::Result<Vec<u8>>) -> SourceFile {
    let content = content.map(Arc::new).map_err(|e| format!("cannot be read: {e}"));
    SourceFile { path, content, modified: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_on_files_directories_and_standard_input() {
        let tmp = tempfile::tempdir().unwrap();
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n";
        std::fs::write(tmp.path().join("a.yaml"), service).unwrap();
        let a = tmp.path().join("a.yaml");
        let check = |paths: &[PathBuf], stdin: &str| validate_files(paths, &mut stdin.as_bytes());

        let v = check(std::slice::from_ref(&a), "");
        assert_eq!((v.exit_code(), v.reports.len()), (0, 1));
        let json = serde_json::to_value(&v.reports).unwrap();
        assert_eq!(
            json,
            serde_json::json!([{
                "file": a.display().to_string(), "document": 1, "apiVersion": "v1", "kind": "Service",
                "namespace": "default", "name": "a", "valid": true, "errors": [], "warnings": []
            }])
        );

        let v = check(&[PathBuf::from("-"), tmp.path().to_owned(), a.clone()], &format!("---\n{service}"));
        assert_eq!((v.exit_code(), v.reports.len()), (1, 2), "{:?}", v.reports);
        assert_eq!(v.reports[0].file, "-");
        assert!(v.reports.iter().any(|r| r.errors.iter().any(|e| e.message.contains("duplicate"))));

        let v = check(&[tmp.path().join("absent.yaml"), a.clone()], "");
        assert_eq!(v.exit_code(), 2);
        assert!(v.reports[0].errors[0].message.contains("cannot be read"));

        let bad = service
            .replace("port: 80", "port: 80, prot: x")
            .replace("v1", "networking.istio.io/v1")
            .replace("kind: Service", "kind: VirtualService");
        let v = check(&[PathBuf::from("-")], &bad);
        assert_eq!(v.exit_code(), 1);
        let text = crate::render_text(&v.reports);
        assert!(text.contains("-: VirtualService default/a: INVALID"), "{text}");
        assert!(text.contains("error: -:4: spec.ports: unknown field `ports`"), "{text}");
    }

    #[test]
    fn hosts_that_others_may_define_are_warnings() {
        let vs = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: a}\nspec: {hosts: [r], http: [{route: [{destination: {host: r}}]}]}\n";
        let v = validate_files(&[PathBuf::from("-")], &mut vs.as_bytes());
        assert_eq!(v.exit_code(), 0);
        assert!(v.reports[0].warnings[0].message.contains("unknown host"));
    }
}
