//! Device memory from the driver's own allocator, and copies of it between GPUs, as the link probe needs them.

use std::sync::Arc;

use cudarc::driver::sys as cu;

use super::{
    driver::{Context, check, tell},
    queue::Queue,
};
use crate::DeviceError;

/// Device memory that the driver has found addresses for.
pub(super) struct Plain {
    context: Arc<Context>,
    address: u64,
    len: usize,
}

impl Plain {
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut address = 0;
        // SAFETY: the driver writes an address; the memory is ours.
        check("cuMemAlloc", unsafe { cu::cuMemAlloc_v2(&raw mut address, len) })?;
        Ok(Self { context: Arc::clone(context), address, len })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Copies all of it to another GPU's, behind what is queued there. The copy may go on when this returns: the caller
    /// waits for the queue before either is dropped.
    pub(super) fn copy_to(&self, to: &Self, queue: &Queue) -> Result<(), DeviceError> {
        if self.len != to.len {
            return Err(DeviceError::Invalid("a copy between stretches of different lengths"));
        }
        let (here, there) = (self.context.raw(), to.context.raw());
        // SAFETY: both stretches are ours and of this length, both contexts are retained, and the queue is alive.
        let result = unsafe { cu::cuMemcpyPeerAsync(to.address, there, self.address, here, self.len, queue.raw()) };
        check("cuMemcpyPeerAsync", result)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: it is ours, and whoever queued a copy of it has waited for that.
            tell("cuMemFree", unsafe { cu::cuMemFree_v2(self.address) });
        }
    }
}

/// One GPU's access to the memory of another, as long as this lives.
pub(super) struct Access {
    from: Arc<Context>,
    to: Arc<Context>,
    /// Whether others had it before, and keep it.
    is_theirs: bool,
}

impl Access {
    pub(super) fn new(from: &Arc<Context>, to: &Arc<Context>) -> Result<Self, DeviceError> {
        from.enter()?;
        // SAFETY: both contexts are retained; the flags must be 0.
        let result = unsafe { cu::cuCtxEnablePeerAccess(to.raw(), 0) };
        let is_theirs = result == cu::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
        if !is_theirs {
            check("cuCtxEnablePeerAccess", result)?;
        }
        Ok(Self { from: Arc::clone(from), to: Arc::clone(to), is_theirs })
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        if !self.is_theirs && self.from.enter().is_ok() {
            // SAFETY: both contexts are retained, and the access is ours.
            tell("cuCtxDisablePeerAccess", unsafe { cu::cuCtxDisablePeerAccess(self.to.raw()) });
        }
    }
}
