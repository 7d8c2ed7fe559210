//! Which model the function runs: its files, and the digest that names it everywhere.
//!
//! A digest is taken once, at start, by reading every file. Whether the files are a model at all is the broker's to say.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    sync::Arc,
};

use faaswap_protocol::{Bytes, ModelDigest, ModelFile, limits::MODEL_FILES_MAX};
use sha2::{Digest, Sha256};

use crate::{fetch::Remote, limits::FOLDER_FILES_MAX};

/// What configuration says of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// The broker has it already.
    Digest(ModelDigest),
    /// A graph and the files that hold its external data, named relative to the graph's folder.
    File {
        /// The `.onnx` file.
        graph: PathBuf,
        /// Its external data.
        data: Vec<String>,
    },
    /// A folder with one `.onnx` file; its other regular files are the external data.
    Folder(PathBuf),
    /// A graph, and its external data, on a server.
    Remote(Arc<Remote>),
}

/// A model that can be registered, and uploaded when `files` are there.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// What the model is called on the wire.
    pub digest: ModelDigest,
    /// The graph, then its external data; empty: only the digest is known here.
    pub files: Vec<LocalFile>,
    /// Where the files come from if the broker wants them and they are not here.
    pub remote: Option<Arc<Remote>>,
}

/// One file of a model on this machine.
#[derive(Clone, Debug)]
pub struct LocalFile {
    /// What the broker is told.
    pub file: ModelFile,
    /// Where it lies.
    pub place: Place,
}

/// Where a file lies.
#[derive(Clone, Debug)]
pub enum Place {
    /// There.
    Path(PathBuf),
    /// It has no name, and is gone with the last that holds it.
    Held(Arc<File>),
}

impl LocalFile {
    /// The file, to be read from its beginning. One that is held has one position for all who opened it.
    pub fn open(&self) -> io::Result<File> {
        match &self.place {
            Place::Path(path) => {
                File::open(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
            }
            Place::Held(file) => {
                let mut file = file.try_clone()?;
                file.rewind()?;
                Ok(file)
            }
        }
    }
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("model file {path}: {error}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A folder without a graph, or with several.
    #[error("model folder {path} holds {found} .onnx files, exactly one is needed (or name the file)")]
    Graphs {
        /// The folder.
        path: PathBuf,
        /// How many.
        found: usize,
    },
    /// A model on a server: `fetch` brings those.
    #[error("the model is not on this machine")]
    NotHere,
    /// Other content than was pinned.
    #[error("the model is {came}, model_digest wants {wanted}")]
    Digest {
        /// What there is.
        came: ModelDigest,
        /// What was wanted.
        wanted: ModelDigest,
    },
    /// More files than a model may have.
    #[error("the model has {found} files, at most {MODEL_FILES_MAX} are allowed")]
    Files {
        /// How many.
        found: usize,
    },
}

impl ModelSource {
    /// A model of which only the digest is known here.
    pub fn known(digest: ModelDigest) -> Self {
        Self { digest, files: Vec::new(), remote: None }
    }

    /// The same model, if it is what was pinned.
    pub fn expect(self, wanted: Option<ModelDigest>) -> Result<Self, ModelError> {
        match wanted {
            Some(wanted) if wanted != self.digest => Err(ModelError::Digest { came: self.digest, wanted }),
            Some(_) | None => Ok(self),
        }
    }

    /// Finds the model's files on this machine and takes their digest. Reads every byte: for a thread that may block.
    pub fn load(model: &ModelRef) -> Result<Self, ModelError> {
        let paths = match model {
            ModelRef::Digest(digest) => return Ok(Self::known(*digest)),
            ModelRef::Remote(_) => return Err(ModelError::NotHere),
            ModelRef::File { graph, data } => {
                let folder = graph.parent().unwrap_or(Path::new("."));
                let data = data.iter().map(|name| (name.clone(), folder.join(name)));
                std::iter::once((file_name(graph), graph.clone())).chain(data).collect()
            }
            ModelRef::Folder(folder) => scan(folder)?,
        };
        if paths.len() > MODEL_FILES_MAX {
            return Err(ModelError::Files { found: paths.len() });
        }
        let mut files = Vec::with_capacity(paths.len());
        let mut digests = Vec::with_capacity(paths.len());
        for (name, path) in paths {
            let (len, digest) = digest_of(&path).map_err(|error| ModelError::Read { path: path.clone(), error })?;
            let file = ModelFile { path: name, len: Bytes::new(len) };
            digests.push((file.clone(), digest));
            files.push(LocalFile { file, place: Place::Path(path) });
        }
        Ok(Self { digest: ModelDigest::of_files(&digests), files, remote: None })
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The files of a model folder, graph first.
fn scan(folder: &Path) -> Result<Vec<(String, PathBuf)>, ModelError> {
    let unreadable = |error| ModelError::Read { path: folder.to_owned(), error };
    let mut graphs = Vec::new();
    let mut data = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)?.take(FOLDER_FILES_MAX) {
        let path = entry.map_err(unreadable)?.path();
        let name = file_name(&path);
        if name.starts_with('.') || !path.is_file() {
            continue;
        }
        let kind = if path.extension().is_some_and(|end| end == "onnx") { &mut graphs } else { &mut data };
        kind.push((name, path));
    }
    let [graph] = <[_; 1]>::try_from(graphs)
        .map_err(|graphs: Vec<_>| ModelError::Graphs { path: folder.to_owned(), found: graphs.len() })?;
    data.sort();
    Ok(std::iter::once(graph).chain(data).collect())
}

fn digest_of(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 18];
    let mut len = 0;
    loop {
        let read = file.read(&mut chunk)?;
        let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Ok((len, hash.finalize().into()));
        };
        hash.update(bytes);
        len += Bytes::of_len(read).get();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_one_file_has_the_digest_of_that_file() {
        let folder = tempfile::tempdir().unwrap();
        let graph = folder.path().join("m.onnx");
        fs::write(&graph, b"graph").unwrap();
        let model = ModelSource::load(&ModelRef::File { graph, data: vec![] }).unwrap();
        assert_eq!(model.digest, ModelDigest(Sha256::digest(b"graph").into()));
        assert_eq!(model.files[0].file, ModelFile { path: "m.onnx".into(), len: Bytes::new(5) });
    }

    #[test]
    fn a_folder_is_a_graph_and_its_data_in_whatever_way_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("m.onnx"), b"graph").unwrap();
        fs::write(folder.path().join("w.bin"), b"weights").unwrap();
        let whole = ModelSource::load(&ModelRef::Folder(folder.path().to_owned())).unwrap();
        let named = ModelRef::File { graph: folder.path().join("m.onnx"), data: vec!["w.bin".into()] };
        assert_eq!(whole.digest, ModelSource::load(&named).unwrap().digest);
        assert_eq!(whole.files.len(), 2);
    }

    #[test]
    fn a_folder_with_two_graphs_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.onnx"), b"a").unwrap();
        fs::write(folder.path().join("b.onnx"), b"b").unwrap();
        let refused = ModelSource::load(&ModelRef::Folder(folder.path().to_owned()));
        assert!(matches!(refused, Err(ModelError::Graphs { found: 2, .. })), "{refused:?}");
    }
}
