//! Takes a model's files from a peer: copies, hashes, and believes only the copy's digest.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::OwnedFd,
    path::PathBuf,
};

use faaswap_protocol::{Bytes, Detail, ModelDigest, ModelFile, Refusal};
use rustix::fs::FileType;
use sha2::{Digest, Sha256};

use super::{Contents, Store};

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Why an upload came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The peer's fault.
    #[error("{0}")]
    Refused(String),
    /// Ours, or the disk's.
    #[error("the model cannot be stored: {0}")]
    Io(#[from] io::Error),
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        Self::UploadFailed { reason: Detail::from(error.to_string()) }
    }
}

/// An upload under way: files come one after the other, each in pieces.
#[derive(Debug)]
pub struct Upload {
    store: Store,
    model: ModelDigest,
    files: Vec<ModelFile>,
    draft: PathBuf,
    done: Vec<(ModelFile, [u8; 32])>,
    open: Option<(File, Sha256, u64)>,
}

impl Upload {
    /// Makes room for files that were checked with [`super::check_files`].
    pub fn begin(store: &Store, model: ModelDigest, files: Vec<ModelFile>) -> Result<Self, UploadError> {
        let draft = store.draft()?;
        Ok(Self { store: store.clone(), model, files, draft, done: Vec::new(), open: None })
    }

    /// Takes the next bytes, which may belong to several files. True once all have come.
    pub fn take(&mut self, mut bytes: &[u8]) -> Result<bool, UploadError> {
        loop {
            let Some(file) = self.files.get(self.done.len()).cloned() else {
                if bytes.is_empty() {
                    return Ok(true);
                }
                return Err(UploadError::Refused(format!("{} bytes came after the last file", bytes.len())));
            };
            if self.open.is_none() {
                let handle = File::create_new(self.draft.join(&file.path))?;
                self.open = Some((handle, Sha256::new(), 0));
            }
            let Some((handle, hash, len)) = &mut self.open else { return Ok(false) };
            let wanted = file.len.get() - *len;
            let now = usize::try_from(wanted).unwrap_or(usize::MAX).min(bytes.len());
            handle.write_all(&bytes[..now])?;
            hash.update(&bytes[..now]);
            *len += now as u64;
            bytes = &bytes[now..];
            if *len < file.len.get() {
                return Ok(false);
            }
            if let Some((handle, hash, _)) = self.open.take() {
                handle.sync_all()?;
                self.done.push((file, hash.finalize().into()));
            }
        }
    }

    /// Keeps the model where it is what it was called.
    pub fn finish(mut self) -> Result<(), UploadError> {
        let found = ModelDigest::of_files(&self.done);
        if found != self.model {
            return Err(UploadError::Refused(format!("the files are {found}, not {}", self.model)));
        }
        let contents = Contents { files: std::mem::take(&mut self.files) };
        Ok(self.store.keep(&self.draft, &self.model, &contents)?)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Taken over or not there any more; else a leftover goes at the next start.
        let _ = fs::remove_dir_all(&self.draft);
    }
}

/// Copies the files behind the descriptors. Reads at positions of its own: the descriptors' offsets are the peer's.
pub fn copy_files(upload: Upload, fds: &[OwnedFd]) -> Result<(), UploadError> {
    let mut upload = upload;
    let mut buffer = vec![0; COPY_BYTES];
    let files = upload.files.clone();
    let mut all_there = upload.take(&[])?;
    for (file, fd) in files.iter().zip(fds) {
        let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(UploadError::Refused(format!("{} is no regular file", file.path)));
        }
        let size = Bytes::new(u64::try_from(stat.st_size).unwrap_or(0));
        if size != file.len {
            return Err(UploadError::Refused(format!("{} has {size}, {} were announced", file.path, file.len)));
        }
        let mut at = 0;
        while at < file.len.get() {
            let wanted = usize::try_from(file.len.get() - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut buffer[..wanted], at));
            let read = read.map_err(|e| UploadError::Refused(format!("{} cannot be read: {e}", file.path)))?;
            if read == 0 {
                return Err(UploadError::Refused(format!("{} became shorter while it was read", file.path)));
            }
            all_there = upload.take(&buffer[..read])?;
            at += read as u64;
        }
    }
    if !all_there {
        return Err(UploadError::Refused("fewer bytes came than were announced".to_owned()));
    }
    upload.finish()
}
