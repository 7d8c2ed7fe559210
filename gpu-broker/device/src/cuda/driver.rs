//! The calls of the CUDA driver that we make, each checked, behind types that give back what they hold.
//!
//! Everything else of the CUDA device is built of these. An error that the driver calls sticky means that the context,
//! and with it the device, is lost.

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::driver::sys as cu;
use faaswap_protocol::Bytes;

use crate::{DeviceError, PciAddress};

/// A call's result as ours.
pub(super) fn check(call: &'static str, result: cu::CUresult) -> Result<(), DeviceError> {
    use cu::CUresult as R;
    if result == R::CUDA_SUCCESS {
        return Ok(());
    }
    let sticky = [
        R::CUDA_ERROR_ILLEGAL_ADDRESS,
        R::CUDA_ERROR_LAUNCH_FAILED,
        R::CUDA_ERROR_LAUNCH_TIMEOUT,
        R::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        R::CUDA_ERROR_MISALIGNED_ADDRESS,
        R::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        R::CUDA_ERROR_INVALID_PC,
        R::CUDA_ERROR_HARDWARE_STACK_ERROR,
        R::CUDA_ERROR_ASSERT,
        R::CUDA_ERROR_ECC_UNCORRECTABLE,
        R::CUDA_ERROR_NVLINK_UNCORRECTABLE,
        R::CUDA_ERROR_CONTEXT_IS_DESTROYED,
        R::CUDA_ERROR_DEVICE_UNAVAILABLE,
    ];
    if result == R::CUDA_ERROR_OUT_OF_MEMORY && call == "cuMemCreate" {
        return Err(DeviceError::OutOfMemory { needed: Bytes::ZERO, free: Bytes::ZERO });
    }
    if sticky.contains(&result) {
        // Each call fails from now on, and one line says it.
        static TOLD: AtomicBool = AtomicBool::new(false);
        match TOLD.swap(true, Ordering::Relaxed) {
            false => tracing::error!(call, ?result, "a device is lost"),
            true => tracing::debug!(call, ?result, "a device is lost"),
        }
        return Err(DeviceError::Lost);
    }
    Err(DeviceError::Failed { call, reason: format!("{result:?}") })
}

/// What fails while something is given back can only be told.
pub(super) fn tell(call: &'static str, result: cu::CUresult) {
    match check(call, result) {
        Ok(()) => {}
        // It has gone with the device.
        Err(DeviceError::Lost) => {}
        Err(error) => tracing::warn!(%error, "giving back what the driver has lent failed"),
    }
}

/// Starts the driver; says what is missing where there is none.
pub(super) fn start() -> Result<(), DeviceError> {
    if !is_present() {
        let reason = "libcuda.so.1 is not there: is the NVIDIA driver installed, and visible in this container?";
        return Err(DeviceError::Failed { call: "loading the CUDA driver", reason: reason.to_owned() });
    }
    // SAFETY: the flags must be 0.
    check("cuInit", unsafe { cu::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the driver writes an int.
    check("cuDriverGetVersion", unsafe { cu::cuDriverGetVersion(&raw mut version) })?;
    if version < super::DRIVER_CUDA_MIN {
        let (found, needed) = (version, super::DRIVER_CUDA_MIN);
        let text = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        let reason = format!("the driver supports CUDA {}, {} is needed: update it", text(found), text(needed));
        return Err(DeviceError::Failed { call: "loading the CUDA driver", reason });
    }
    Ok(())
}

/// Whether the driver's library can be found at all.
pub(super) fn is_present() -> bool {
    // SAFETY: looking for the library runs its initializers; it is the driver that the operator has installed.
    unsafe { cu::is_culib_present() }
}

/// How many GPUs there are.
pub(super) fn count() -> Result<i32, DeviceError> {
    start()?;
    let mut count = 0;
    // SAFETY: the driver writes an int.
    check("cuDeviceGetCount", unsafe { cu::cuDeviceGetCount(&raw mut count) })?;
    Ok(count)
}

/// Whether a GPU can reach another one's memory by itself.
pub(super) fn can_reach(from: i32, to: i32) -> Result<bool, DeviceError> {
    let mut can = 0;
    // SAFETY: the driver writes an int; it checks the devices.
    let result = unsafe { cu::cuDeviceCanAccessPeer(&raw mut can, from, to) };
    check("cuDeviceCanAccessPeer", result).map(|()| can != 0)
}

/// One GPU's primary context, which it shares with the runtime library.
#[derive(Debug)]
pub(crate) struct Context {
    raw: usize,
    pub(super) device: i32,
}

impl Context {
    pub(super) fn open(ordinal: i32) -> Result<Arc<Self>, DeviceError> {
        let count = count()?;
        if ordinal >= count {
            let reason = format!("there is no GPU {ordinal}: {count} are visible");
            return Err(DeviceError::Failed { call: "cuDeviceGet", reason });
        }
        let mut device = 0;
        // SAFETY: the driver writes an int.
        check("cuDeviceGet", unsafe { cu::cuDeviceGet(&raw mut device, ordinal) })?;
        let mut raw = ptr::null_mut();
        // SAFETY: the driver writes a handle, which is ours to release.
        check("cuDevicePrimaryCtxRetain", unsafe { cu::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        let context = Self { raw: raw.expose_provenance(), device };
        context.enter()?;
        Ok(Arc::new(context))
    }

    pub(super) fn raw(&self) -> cu::CUcontext {
        ptr::with_exposed_provenance_mut(self.raw)
    }

    /// Makes this the calling thread's context: everything else asks for that.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(self.raw()) })
    }

    /// Free and total memory by the driver's count.
    pub(super) fn memory(&self) -> Result<(Bytes, Bytes), DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two sizes.
        check("cuMemGetInfo", unsafe { cu::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((Bytes::of_len(free), Bytes::of_len(total)))
    }

    pub(super) fn model_name(&self) -> Result<String, DeviceError> {
        let mut text = [0_u8; 128];
        let len = i32::try_from(text.len()).expect("128 fits");
        // SAFETY: the driver writes at most `len` bytes, the last of them zero.
        check("cuDeviceGetName", unsafe { cu::cuDeviceGetName(text.as_mut_ptr().cast(), len, self.device) })?;
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        Ok(String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// Where the GPU sits on its bus.
    pub(super) fn pci_address(&self) -> Result<PciAddress, DeviceError> {
        let mut text = [0_u8; 32];
        let len = i32::try_from(text.len()).expect("32 fits");
        // SAFETY: the driver writes at most `len` bytes, the last of them zero.
        check("cuDeviceGetPCIBusId", unsafe { cu::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), len, self.device) })?;
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        String::from_utf8_lossy(&text[..end]).parse()
    }

    fn properties(&self, handles: cu::CUmemAllocationHandleType) -> cu::CUmemAllocationProp {
        let flags = cu::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        };
        cu::CUmemAllocationProp {
            type_: cu::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: handles,
            location: location(self.device),
            win32HandleMetaData: ptr::null_mut(),
            allocFlags: flags,
        }
    }

    fn attribute(&self, attribute: cu::CUdevice_attribute) -> Result<i32, DeviceError> {
        let mut value = 0;
        // SAFETY: the driver writes an int; the device is one of its own.
        let result = unsafe { cu::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        check("cuDeviceGetAttribute", result).map(|()| value)
    }

    /// The compute capability: 90 for 9.0.
    pub(super) fn capability(&self) -> Result<i32, DeviceError> {
        use cu::CUdevice_attribute as A;
        let major = self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        Ok(major * 10 + self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?)
    }

    /// Whether the GPU reads registered memory at the addresses that it has on the host.
    pub(super) fn reads_registered(&self) -> Result<bool, DeviceError> {
        use cu::CUdevice_attribute as A;
        Ok(self.attribute(A::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)? != 0)
    }

    /// What physical memory comes in multiples of.
    pub(super) fn granularity(&self) -> Result<Bytes, DeviceError> {
        let mut granularity = 0;
        let wanted = cu::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        let properties = self.properties(NOT_SHARED);
        // SAFETY: the driver reads the properties and writes a size.
        let result = unsafe { cu::cuMemGetAllocationGranularity(&raw mut granularity, &raw const properties, wanted) };
        check("cuMemGetAllocationGranularity", result)?;
        Ok(Bytes::of_len(granularity))
    }

    /// Sets device memory to zeros and waits for it.
    pub(super) fn zero(&self, address: u64, len: usize) -> Result<(), DeviceError> {
        self.enter()?;
        // A stream of its own: to wait for the whole device would spoil what other threads capture.
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as std::ffi::c_uint;
        let mut stream = ptr::null_mut();
        // SAFETY: the driver writes a handle, which is ours.
        check("cuStreamCreate", unsafe { cu::cuStreamCreate(&raw mut stream, flags) })?;
        // SAFETY: a wrong address is an error of the driver's; ours are mapped by the callers.
        let set = check("cuMemsetD8Async", unsafe { cu::cuMemsetD8Async(address, 0, len, stream) });
        // SAFETY: the handle is alive.
        let done = check("cuStreamSynchronize", unsafe { cu::cuStreamSynchronize(stream) });
        // SAFETY: the handle is ours and not used any more.
        tell("cuStreamDestroy", unsafe { cu::cuStreamDestroy_v2(stream) });
        set.and(done)
    }

    /// Waits for everything that the context was given to do.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the call takes nothing.
        check("cuCtxSynchronize", unsafe { cu::cuCtxSynchronize() })
    }

    /// Whether there is memory of a device at this address.
    pub(super) fn is_device_memory(&self, address: u64) -> bool {
        use cu::CUpointer_attribute as A;
        let mut kind = 0_u32;
        let asked = A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: the driver writes a number of 32 bits, or says that it knows nothing of the address.
        let result = unsafe { cu::cuPointerGetAttribute((&raw mut kind).cast(), asked, address) };
        result == cu::CUresult::CUDA_SUCCESS && kind == cu::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32
    }

    /// Reads device memory and waits for it.
    pub(super) fn read(&self, address: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `into` is a unique slice of this length; a wrong device address is an error of the driver's.
        check("cuMemcpyDtoH", unsafe { cu::cuMemcpyDtoH_v2(into.as_mut_ptr().cast(), address, into.len()) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, by us.
        tell("cuDevicePrimaryCtxRelease", unsafe { cu::cuDevicePrimaryCtxRelease_v2(self.device) });
    }
}

fn location(device: i32) -> cu::CUmemLocation {
    cu::CUmemLocation { type_: cu::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// Physical device memory, reachable nowhere until it is mapped.
#[derive(Debug)]
pub(super) struct Physical(u64);

/// Memory that no other process can have.
const NOT_SHARED: cu::CUmemAllocationHandleType = cu::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
/// Memory that descriptors can be had of.
const SHARED: cu::CUmemAllocationHandleType = cu::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

impl Physical {
    pub(super) fn new(context: &Context, len: usize) -> Result<Self, DeviceError> {
        Self::with(context, len, NOT_SHARED)
    }

    /// Memory that other processes may have too.
    pub(super) fn new_shared(context: &Context, len: usize) -> Result<Self, DeviceError> {
        Self::with(context, len, SHARED)
    }

    fn with(context: &Context, len: usize, handles: cu::CUmemAllocationHandleType) -> Result<Self, DeviceError> {
        let mut handle = 0;
        let properties = context.properties(handles);
        // SAFETY: the driver reads the properties and writes a handle, which is ours.
        let made = check("cuMemCreate", unsafe { cu::cuMemCreate(&raw mut handle, len, &raw const properties, 0) });
        if matches!(made, Err(DeviceError::OutOfMemory { .. })) {
            return Err(DeviceError::OutOfMemory { needed: Bytes::of_len(len), free: context.memory()?.0 });
        }
        made?;
        Ok(Self(handle))
    }

    /// A descriptor of it, for another process.
    pub(super) fn export(&self) -> Result<OwnedFd, DeviceError> {
        let mut fd: RawFd = -1;
        // SAFETY: the driver writes a descriptor; the handle is ours.
        let exported = unsafe { cu::cuMemExportToShareableHandle((&raw mut fd).cast(), self.0, SHARED, 0) };
        check("cuMemExportToShareableHandle", exported)?;
        // SAFETY: it is open, and the driver has given it to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Another process' memory.
    pub(super) fn import(context: &Context, fd: BorrowedFd<'_>) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut handle = 0;
        let fd = usize::try_from(fd.as_raw_fd()).map_err(|_| DeviceError::Invalid("no descriptor"))?;
        // SAFETY: the driver takes the descriptor's number in the place of a pointer, and writes a handle, which is ours.
        let imported =
            unsafe { cu::cuMemImportFromShareableHandle(&raw mut handle, ptr::without_provenance_mut(fd), SHARED) };
        check("cuMemImportFromShareableHandle", imported)?;
        Ok(Self(handle))
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: the handle is ours. Memory that is still mapped stays until it is unmapped.
        tell("cuMemRelease", unsafe { cu::cuMemRelease(self.0) });
    }
}

/// Reserved device addresses.
pub(super) struct Addresses {
    context: Arc<Context>,
    base: u64,
    len: usize,
}

impl Addresses {
    pub(super) fn reserve(context: &Arc<Context>, len: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut base = 0;
        // SAFETY: the driver writes an address; the range is ours.
        check("cuMemAddressReserve", unsafe { cu::cuMemAddressReserve(&raw mut base, len, 0, 0, 0) })?;
        Ok(Self { context: Arc::clone(context), base, len })
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, len: usize) -> Result<u64, DeviceError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let offset = u64::try_from(offset).ok().filter(|_| inside);
        offset.map(|offset| self.base + offset).ok_or(DeviceError::Invalid("a stretch outside its addresses"))
    }

    /// Puts memory behind addresses; [`Addresses::open`] makes it usable.
    pub(super) fn map(&self, offset: usize, memory: &Physical, len: usize) -> Result<(), DeviceError> {
        let at = self.at(offset, len)?;
        // SAFETY: the addresses are ours, and the driver checks that nothing is mapped there and that sizes agree.
        check("cuMemMap", unsafe { cu::cuMemMap(at, len, 0, memory.0, 0) })
    }

    /// Lets the device read and write what is mapped there.
    pub(super) fn open(&self, offset: usize, len: usize) -> Result<(), DeviceError> {
        let flags = cu::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        self.grant(self.context.device, flags, offset, len)
    }

    /// Lets another GPU read what is mapped there.
    pub(super) fn open_to(&self, other: i32, offset: usize, len: usize) -> Result<(), DeviceError> {
        use cu::CUmemAccess_flags as F;
        // Not every driver knows mappings that are read only.
        let read_only = self.grant(other, F::CU_MEM_ACCESS_FLAGS_PROT_READ, offset, len);
        read_only.or_else(|_| self.grant(other, F::CU_MEM_ACCESS_FLAGS_PROT_READWRITE, offset, len))
    }

    fn grant(&self, to: i32, flags: cu::CUmemAccess_flags, offset: usize, len: usize) -> Result<(), DeviceError> {
        let at = self.at(offset, len)?;
        let access = cu::CUmemAccessDesc { location: location(to), flags };
        // SAFETY: the table has one entry.
        check("cuMemSetAccess", unsafe { cu::cuMemSetAccess(at, len, &raw const access, 1) })
    }

    /// Takes the memory of several stretches away, in order; those beside each other at once.
    pub(super) fn unmap_all(&self, stretches: &[(usize, usize)]) -> Result<(), DeviceError> {
        let mut beside = stretches.chunk_by(|(at, len), (next, _)| at + len == *next);
        beside.try_for_each(|run| self.unmap(run[0].0, run.iter().map(|(_, len)| len).sum()))
    }

    /// Takes the memory away. The caller sees to it that nothing on the device uses it.
    pub(super) fn unmap(&self, offset: usize, len: usize) -> Result<(), DeviceError> {
        if len == 0 {
            return Ok(());
        }
        let at = self.at(offset, len)?;
        // SAFETY: the addresses are ours; a device that still used them would fault, not read what is not its own.
        check("cuMemUnmap", unsafe { cu::cuMemUnmap(at, len) })
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the range is ours, and nothing is mapped there any more.
            tell("cuMemAddressFree", unsafe { cu::cuMemAddressFree(self.base, self.len) });
        }
    }
}
