//! The lock file: that it exists says to exec probes that the function's front serves.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::app::AppError;

/// Where of-watchdog has it, and where probes look: `/tmp/.lock` unless `TMPDIR` says otherwise.
pub fn path() -> PathBuf {
    std::env::temp_dir().join(".lock")
}

/// The file, removed when dropped.
#[derive(Debug)]
pub struct Lock(PathBuf);

impl Lock {
    /// Writes the file, and makes its folder where there is none.
    pub fn take(path: PathBuf) -> Result<Self, AppError> {
        let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
        folder.and_then(|()| fs::write(&path, [])).map_err(|error| AppError::Lock { path: path.clone(), error })?;
        Ok(Self(path))
    }

    /// Whether it is still there.
    pub fn holds(&self) -> bool {
        self.0.exists()
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes the file away; the front then counts as unhealthy.
    pub fn release(&self) {
        // Gone is what it shall be.
        let _absent = fs::remove_file(&self.0);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.release();
    }
}
