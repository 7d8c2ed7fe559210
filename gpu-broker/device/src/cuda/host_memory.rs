//! Host memory that GPUs read by themselves: of the driver's own, or registered with it.

use std::{
    ffi::c_void,
    ptr,
    sync::{Arc, Weak},
};

use cudarc::driver::sys as cu;

use super::driver::{Context, check, tell};
use crate::DeviceError;

/// Host memory that devices read and write by themselves.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<Context>,
    address: usize,
    len: usize,
}

impl Pinned {
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut address: *mut c_void = ptr::null_mut();
        // SAFETY: the driver writes an address; the memory is ours.
        check("cuMemHostAlloc", unsafe { cu::cuMemHostAlloc(&raw mut address, len, cu::CU_MEMHOSTALLOC_PORTABLE) })?;
        // SAFETY: so many bytes are ours there. Set once, since a slice must not show memory that was never written.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0, len) };
        Ok(Self { context: Arc::clone(context), address: address.expose_provenance(), len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.address)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: it is ours and not used any more.
            tell("cuMemFreeHost", unsafe { cu::cuMemFreeHost(self.as_ptr().cast()) });
        }
    }
}

/// Host memory of others that devices may read by themselves, as long as this lives.
#[derive(Debug)]
pub(crate) struct Registration {
    address: usize,
    /// Its owner may be dropped by any thread, and not before the device; a context that is gone has taken it along.
    context: Weak<Context>,
}

impl Registration {
    /// Registers memory for all devices, which read it only.
    ///
    /// # Safety
    /// `len` bytes from `address` must stay mapped until this is dropped.
    pub(crate) unsafe fn new(context: &Arc<Context>, address: *const u8, len: usize) -> Result<Self, DeviceError> {
        let flags = cu::CU_MEMHOSTREGISTER_PORTABLE | cu::CU_MEMHOSTREGISTER_READ_ONLY;
        // SAFETY: the caller's promise.
        unsafe { Self::with(context, address, len, flags) }
    }

    /// Registers memory for kernels of all devices.
    ///
    /// # Safety
    /// `len` bytes from `address` must stay mapped, for reading and writing, until this is dropped.
    pub(super) unsafe fn for_kernels(
        context: &Arc<Context>,
        address: *const u8,
        len: usize,
    ) -> Result<Self, DeviceError> {
        let flags = cu::CU_MEMHOSTREGISTER_PORTABLE | cu::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller's promise.
        unsafe { Self::with(context, address, len, flags) }
    }

    /// # Safety
    /// As [`Registration::new`] or, where it is not read only, [`Registration::for_kernels`].
    unsafe fn with(context: &Arc<Context>, address: *const u8, len: usize, flags: u32) -> Result<Self, DeviceError> {
        context.enter()?;
        // SAFETY: the caller's promise.
        let result = unsafe { cu::cuMemHostRegister_v2(address.cast_mut().cast(), len, flags) };
        check("cuMemHostRegister", result)?;
        Ok(Self { address: address.expose_provenance(), context: Arc::downgrade(context) })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.context.upgrade().is_some_and(|context| context.enter().is_ok()) {
            let address = ptr::with_exposed_provenance_mut(self.address);
            // SAFETY: it was registered by us, once, and is still mapped.
            tell("cuMemHostUnregister", unsafe { cu::cuMemHostUnregister(address) });
        }
    }
}
