//! The workspace of cuBLAS, which multiplies matrices for ONNX Runtime.
//!
//! By itself it takes one from the driver: while a run is captured that becomes memory which the graph owns, of a kind
//! whose nodes cannot be replaced, and of which every program has its own. Given one of a lane's, it takes none.

use std::{
    ffi::{c_int, c_void},
    ptr,
    sync::OnceLock,
};

use libloading::os::unix::{Library, RTLD_NOW};
use ort::{ep::cuda::resource::CuBLASHandle, operator::ComputeContext};

/// `cublasSetWorkspace_v2`: a handle, an address on the device, a size.
type SetWorkspace = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int;

/// Only a library that is loaded already is looked at: the one that ONNX Runtime uses.
const RTLD_NOLOAD: c_int = 4;
/// The libraries that ONNX Runtime's builds for CUDA 13 and 12 use.
const LIBRARIES: [&str; 2] = ["libcublas.so.13", "libcublas.so.12"];

/// Has the matrix products of the session that runs use this workspace from now on: its address and size.
pub(crate) fn use_workspace(context: &ComputeContext, (address, size): (usize, usize)) -> ort::Result<()> {
    static SET: OnceLock<Option<SetWorkspace>> = OnceLock::new();
    let Some(set) = *SET.get_or_init(find) else { return Ok(()) };
    let handle = context.resource(CuBLASHandle)?;
    // SAFETY: the handle is that of the session that runs, and alive; the workspace is a lane's, which lives as long as
    // the device, and nothing else uses it while this lane runs.
    let status = unsafe { set(handle.cast_mut().cast(), ptr::with_exposed_provenance_mut(address), size) };
    if status == 0 { Ok(()) } else { Err(ort::Error::new(format!("cublasSetWorkspace failed with {status}"))) }
}

fn find() -> Option<SetWorkspace> {
    let open = |name: &&str| {
        // SAFETY: nothing is loaded by this, so no initializer runs.
        unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_NOLOAD) }.ok()
    };
    let Some(library) = LIBRARIES.iter().find_map(open) else {
        tracing::info!("cuBLAS is not found; programs with matrix products have workspaces of their own");
        return None;
    };
    // SAFETY: a library of this name exports the function with this type in all its versions.
    let set = unsafe { library.get::<SetWorkspace>(b"cublasSetWorkspace_v2\0") }.ok().map(|found| *found);
    // It stays loaded: the function is kept.
    std::mem::forget(library);
    set
}
