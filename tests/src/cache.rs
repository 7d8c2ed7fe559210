//! Where the things lie that `make fetch` has fetched and cargo has built.

use std::path::{Path, PathBuf};

use faaswap_engine::{Runtime, RuntimeOptions};

use crate::{Result, Trouble};

/// The workspace's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_owned)
}

fn there(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        Ok(path)
    } else {
        Err(Trouble::new(format!("{} is missing: run `make fetch` first", path.display())))
    }
}

fn models_dir() -> PathBuf {
    std::env::var_os("FAASWAP_MODELS_DIR").map_or_else(|| root().join(".cache/models"), PathBuf::from)
}

/// ONNX Runtime's shared library.
pub fn onnxruntime() -> Result<PathBuf> {
    let default = || root().join(".cache/ort/libonnxruntime.so.1.31.1");
    there(std::env::var_os("ORT_DYLIB_PATH").map_or_else(default, PathBuf::from))
}

/// A fetched model, or what lies beside one.
pub fn model(name: &str) -> Result<PathBuf> {
    there(models_dir().join(name))
}

/// The font that text is drawn with.
pub fn font() -> Result<PathBuf> {
    there(models_dir().join("../fonts/SourceSansPro-Regular.ttf"))
}

/// ONNX Runtime in this process, as the broker runs it: one thread per run.
pub fn runtime() -> Result<Runtime> {
    Ok(Runtime::load(&onnxruntime()?, RuntimeOptions::default())?)
}

/// One of our programs: in `FAASWAP_BIN_DIR`, else beside the program that asks.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("FAASWAP_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        let missing = || Trouble::new(format!("FAASWAP_BIN_DIR is set but {} is no file", path.display()));
        return if path.is_file() { Ok(path.clone()) } else { Err(missing()) };
    }
    let me = std::env::current_exe()?;
    // Test programs lie in `deps`, one folder below the others.
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| Trouble::new(format!("{name} is not built: run `cargo build --workspace --bins` first")))
}
