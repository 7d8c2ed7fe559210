//! The calls of the CUDA driver that we make, each checked, behind types that give back what they hold.
//!
//! Everything else of the CUDA device is built of these. An error that the driver calls sticky means that the context,
//! and with it the device, is lost.

use std::{
    ffi::{c_uint, c_ulonglong, c_void},
    mem::MaybeUninit,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::sys as cu;
use faaswap_protocol::Bytes;

use crate::DeviceError;

/// A call's result as ours.
fn check(call: &'static str, result: cu::CUresult) -> Result<(), DeviceError> {
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
        tracing::error!(call, ?result, "the device is lost");
        return Err(DeviceError::Lost);
    }
    Err(DeviceError::Failed { call, reason: format!("{result:?}") })
}

/// What fails while something is given back can only be told.
fn tell(call: &'static str, result: cu::CUresult) {
    if let Err(error) = check(call, result) {
        tracing::warn!(%error, "giving back what the driver has lent failed");
    }
}

/// Starts the driver; says what is missing where there is none.
pub(super) fn start() -> Result<(), DeviceError> {
    // SAFETY: looking for the library runs its initializers; it is the driver that the operator has installed.
    if !unsafe { cu::is_culib_present() } {
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

/// How many GPUs there are.
pub(super) fn count() -> Result<i32, DeviceError> {
    start()?;
    let mut count = 0;
    // SAFETY: the driver writes an int.
    check("cuDeviceGetCount", unsafe { cu::cuDeviceGetCount(&raw mut count) })?;
    Ok(count)
}

/// One GPU's primary context, which it shares with the runtime library.
pub(super) struct Context {
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

    /// Makes this the calling thread's context: everything else asks for that.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { cu::cuCtxSetCurrent(ptr::with_exposed_provenance_mut(self.raw)) })
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

    fn location(&self) -> cu::CUmemLocation {
        let mut location = MaybeUninit::<cu::CUmemLocation>::zeroed();
        let place = location.as_mut_ptr();
        // SAFETY: `place` is valid for writes of the whole struct; the enum's field gets a valid value first of all.
        unsafe { (&raw mut (*place).type_).write(cu::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE) };
        // SAFETY: as above. The rest is zero, which integers may be.
        unsafe { (&raw mut (*place).id).write(self.device) };
        // SAFETY: all fields are set.
        unsafe { location.assume_init() }
    }

    fn properties(&self) -> cu::CUmemAllocationProp {
        let mut properties = MaybeUninit::<cu::CUmemAllocationProp>::zeroed();
        let place = properties.as_mut_ptr();
        // SAFETY: `place` is valid for writes of the whole struct; its enums get valid values.
        unsafe { (&raw mut (*place).type_).write(cu::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED) };
        let none = cu::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
        // SAFETY: as above.
        unsafe { (&raw mut (*place).requestedHandleTypes).write(none) };
        // SAFETY: as above.
        unsafe { (&raw mut (*place).location).write(self.location()) };
        // SAFETY: all enums are set; what is left is integers and a null pointer.
        unsafe { properties.assume_init() }
    }

    /// What physical memory comes in multiples of.
    pub(super) fn granularity(&self) -> Result<Bytes, DeviceError> {
        let mut granularity = 0;
        let wanted = cu::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        let properties = self.properties();
        // SAFETY: the driver reads the properties and writes a size.
        let result = unsafe { cu::cuMemGetAllocationGranularity(&raw mut granularity, &raw const properties, wanted) };
        check("cuMemGetAllocationGranularity", result)?;
        Ok(Bytes::of_len(granularity))
    }

    /// Sets device memory to zeros and waits for it.
    pub(super) fn zero(&self, address: u64, len: usize) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: a wrong address is an error of the driver's; ours are mapped by the callers.
        check("cuMemsetD8", unsafe { cu::cuMemsetD8_v2(address, 0, len) })?;
        self.synchronize()
    }

    /// Waits for everything that the context was given to do.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the call takes nothing.
        check("cuCtxSynchronize", unsafe { cu::cuCtxSynchronize() })
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

/// Physical device memory, reachable nowhere until it is mapped.
#[derive(Debug)]
pub(super) struct Physical(u64);

impl Physical {
    pub(super) fn new(context: &Context, len: usize) -> Result<Self, DeviceError> {
        let mut handle = 0;
        let properties = context.properties();
        // SAFETY: the driver reads the properties and writes a handle, which is ours.
        let made = check("cuMemCreate", unsafe { cu::cuMemCreate(&raw mut handle, len, &raw const properties, 0) });
        if matches!(made, Err(DeviceError::OutOfMemory { .. })) {
            return Err(DeviceError::OutOfMemory { needed: Bytes::of_len(len), free: context.memory()?.0 });
        }
        made?;
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
        let at = self.at(offset, len)?;
        let mut access = MaybeUninit::<cu::CUmemAccessDesc>::zeroed();
        let place = access.as_mut_ptr();
        // SAFETY: `place` is valid for writes of the whole struct.
        unsafe { (&raw mut (*place).location).write(self.context.location()) };
        let flags = cu::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        // SAFETY: as above.
        unsafe { (&raw mut (*place).flags).write(flags) };
        // SAFETY: the table has one entry, and all of its fields are set.
        check("cuMemSetAccess", unsafe { cu::cuMemSetAccess(at, len, place, 1) })
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

/// A marker in a stream.
pub(super) struct Event {
    context: Arc<Context>,
    raw: usize,
}

impl Event {
    /// One whose waiters sleep, and that takes no times.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::with(context, cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint)
    }

    /// One that says when it was reached.
    pub(super) fn timed(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::with(context, 0)
    }

    fn with(context: &Arc<Context>, flags: c_uint) -> Result<Self, DeviceError> {
        context.enter()?;
        let flags = flags | cu::CUevent_flags::CU_EVENT_BLOCKING_SYNC as c_uint;
        let mut raw = ptr::null_mut();
        // SAFETY: the driver writes a handle, which is ours.
        check("cuEventCreate", unsafe { cu::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Self { context: Arc::clone(context), raw: raw.expose_provenance() })
    }

    /// Looks again and again, for so long at most; whether it is done.
    pub(super) fn look(&self, most: Duration) -> Result<bool, DeviceError> {
        let since = Instant::now();
        loop {
            // SAFETY: the handle is alive.
            let result = unsafe { cu::cuEventQuery(self.raw()) };
            if result != cu::CUresult::CUDA_ERROR_NOT_READY {
                return check("cuEventQuery", result).map(|()| true);
            }
            if since.elapsed() >= most {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// The time between two timed events that were reached.
    pub(super) fn since(&self, start: &Self) -> Result<Duration, DeviceError> {
        let mut ms = 0.0_f32;
        // SAFETY: both handles are alive; the driver writes a number.
        check("cuEventElapsedTime", unsafe { cu::cuEventElapsedTime_v2(&raw mut ms, start.raw(), self.raw()) })?;
        Ok(Duration::try_from_secs_f32(ms / 1e3).unwrap_or_default())
    }

    fn raw(&self) -> cu::CUevent {
        ptr::with_exposed_provenance_mut(self.raw)
    }

    /// Sleeps until what was recorded last is done.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the handle is alive.
        check("cuEventSynchronize", unsafe { cu::cuEventSynchronize(self.raw()) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the handle is ours; a graph that waits for it keeps what it needs.
            tell("cuEventDestroy", unsafe { cu::cuEventDestroy_v2(self.raw()) });
        }
    }
}

/// A queue of work on the device.
pub(super) struct Queue {
    context: Arc<Context>,
    raw: usize,
}

impl Queue {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.enter()?;
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        let mut raw = ptr::null_mut();
        // SAFETY: the driver writes a handle, which is ours.
        check("cuStreamCreate", unsafe { cu::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Self { context: Arc::clone(context), raw: raw.expose_provenance() })
    }

    /// The driver's handle, for libraries that queue work of their own.
    pub(super) fn handle(&self) -> usize {
        self.raw
    }

    fn raw(&self) -> cu::CUstream {
        ptr::with_exposed_provenance_mut(self.raw)
    }

    pub(super) fn record(&self, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: both handles are alive and of one context.
        check("cuEventRecord", unsafe { cu::cuEventRecord(event.raw(), self.raw()) })
    }

    /// Copies to the device, behind what is queued.
    ///
    /// # Safety
    /// `len` bytes from `from` must stay readable and unchanged, and the device's addresses mapped, until it is done.
    pub(super) unsafe fn copy_in(&self, to: u64, from: *const u8, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe { cu::cuMemcpyHtoDAsync_v2(to, from.cast(), len, self.raw()) })
    }

    /// Copies from the device, behind what is queued.
    ///
    /// # Safety
    /// `len` bytes from `to` must stay ours alone until it is done.
    pub(super) unsafe fn copy_out(&self, to: *mut u8, from: u64, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoHAsync", unsafe { cu::cuMemcpyDtoHAsync_v2(to.cast(), from, len, self.raw()) })
    }

    /// Waits, asleep, for all that is queued.
    pub(super) fn finish(&self, event: &Event) -> Result<(), DeviceError> {
        self.record(event)?;
        event.wait()
    }

    /// Keeps what is queued from now on as a graph, by this thread alone.
    pub(super) fn begin_capture(&self) -> Result<(), DeviceError> {
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the handle is alive.
        check("cuStreamBeginCapture", unsafe { cu::cuStreamBeginCapture_v2(self.raw(), mode) })
    }

    /// The graph that was kept, ready to be launched.
    pub(super) fn end_capture(&self) -> Result<Graph, DeviceError> {
        let mut graph = ptr::null_mut();
        // SAFETY: the handle is alive; the driver writes a handle, which is ours.
        check("cuStreamEndCapture", unsafe { cu::cuStreamEndCapture(self.raw(), &raw mut graph) })?;
        let mut nodes = 0;
        // SAFETY: without a table the driver writes the number of nodes alone.
        let counted = check("cuGraphGetNodes", unsafe { cu::cuGraphGetNodes(graph, ptr::null_mut(), &raw mut nodes) });
        let mut raw = ptr::null_mut();
        let flags: c_ulonglong = 0;
        // SAFETY: the graph is alive; the driver writes a handle, which is ours.
        let made = unsafe { cu::cuGraphInstantiateWithFlags(&raw mut raw, graph, flags) };
        let made = check("cuGraphInstantiate", made);
        // SAFETY: the graph is ours and not used any more; what was instantiated stands by itself.
        tell("cuGraphDestroy", unsafe { cu::cuGraphDestroy(graph) });
        made?;
        let graph = Graph { context: Arc::clone(&self.context), raw: raw.expose_provenance(), nodes };
        counted.map(|()| graph)
    }
}

/// Makes a stream, given by its handle, wait for an event: within a graph each launch anew, else once.
///
/// # Safety
/// `stream` must be the handle of a stream that is alive.
pub(super) unsafe fn wait_on(stream: usize, event: &Event, when_captured: bool) -> Result<(), DeviceError> {
    let flags = if when_captured { cu::CUevent_wait_flags::CU_EVENT_WAIT_EXTERNAL as c_uint } else { 0 };
    // SAFETY: the caller's promise; the event is alive.
    let result = unsafe { cu::cuStreamWaitEvent(ptr::with_exposed_provenance_mut(stream), event.raw(), flags) };
    check("cuStreamWaitEvent", result)
}

/// Whether a stream, given by its handle, is kept as a graph now.
///
/// # Safety
/// `stream` must be the handle of a stream that is alive.
pub(super) unsafe fn is_captured(stream: usize) -> Result<bool, DeviceError> {
    let mut status = cu::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the caller's promise; the driver writes the status.
    let result = unsafe { cu::cuStreamIsCapturing(ptr::with_exposed_provenance_mut(stream), &raw mut status) };
    check("cuStreamIsCapturing", result)?;
    Ok(status == cu::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE)
}

/// Copies within the device, behind what is queued on a stream given by its handle.
///
/// # Safety
/// `stream` must be the handle of a stream that is alive, and both stretches mapped until the copy is done.
pub(super) unsafe fn copy_within(stream: usize, to: usize, from: usize, len: usize) -> Result<(), DeviceError> {
    let stream = ptr::with_exposed_provenance_mut(stream);
    // SAFETY: the caller's promise.
    let result = unsafe { cu::cuMemcpyDtoDAsync_v2(to as u64, from as u64, len, stream) };
    check("cuMemcpyDtoDAsync", result)
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the handle is ours; work that is still queued is done before the driver frees it.
            tell("cuStreamDestroy", unsafe { cu::cuStreamDestroy_v2(self.raw()) });
        }
    }
}

/// Work that can be launched again and again.
pub(super) struct Graph {
    context: Arc<Context>,
    raw: usize,
    pub(super) nodes: usize,
}

impl Graph {
    pub(super) fn launch(&self, on: &Queue) -> Result<(), DeviceError> {
        // SAFETY: both handles are alive.
        let result = unsafe { cu::cuGraphLaunch(ptr::with_exposed_provenance_mut(self.raw), on.raw()) };
        check("cuGraphLaunch", result)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the handle is ours; the driver waits for launches that are under way.
            tell("cuGraphExecDestroy", unsafe { cu::cuGraphExecDestroy(ptr::with_exposed_provenance_mut(self.raw)) });
        }
    }
}

/// A kernel that copies: inputs go through it, because the copy engine does one copy after the other and
/// may have many milliseconds of weights before it.
pub(super) struct CopyKernel {
    context: Arc<Context>,
    module: usize,
    function: usize,
}

/// Copies `n` times 16 bytes, each thread every so many.
const COPY_PTX: &std::ffi::CStr = c"
.version 7.0
.target sm_70
.address_size 64
.visible .entry copy16(.param .u64 to, .param .u64 from, .param .u64 n)
{
    .reg .pred %p<2>;
    .reg .b32 %r<12>;
    .reg .b64 %d<10>;
    ld.param.u64 %d1, [to];
    ld.param.u64 %d2, [from];
    ld.param.u64 %d3, [n];
    cvta.to.global.u64 %d1, %d1;
    cvta.to.global.u64 %d2, %d2;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mad.lo.u32 %r5, %r1, %r2, %r3;
    cvt.u64.u32 %d4, %r5;
    mul.lo.u32 %r6, %r2, %r4;
    cvt.u64.u32 %d5, %r6;
next:
    setp.ge.u64 %p1, %d4, %d3;
    @%p1 bra done;
    shl.b64 %d6, %d4, 4;
    add.u64 %d7, %d2, %d6;
    add.u64 %d8, %d1, %d6;
    ld.volatile.global.v4.u32 {%r7, %r8, %r9, %r10}, [%d7];
    st.global.v4.u32 [%d8], {%r7, %r8, %r9, %r10};
    add.u64 %d4, %d4, %d5;
    bra next;
done:
    ret;
}
";
/// Bytes that one step of the kernel's threads copies.
const COPY_UNIT: usize = 16;
const COPY_THREADS: u32 = 256;
const COPY_BLOCKS_MAX: u32 = 64;

impl CopyKernel {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut module = ptr::null_mut();
        // SAFETY: the text is PTX and ends with zero; the driver compiles it and writes a handle, which is ours.
        check("cuModuleLoadData", unsafe { cu::cuModuleLoadData(&raw mut module, COPY_PTX.as_ptr().cast()) })?;
        let mut function = ptr::null_mut();
        // SAFETY: the module is alive, the name ends with zero; the function lives as long as its module.
        let found = unsafe { cu::cuModuleGetFunction(&raw mut function, module, c"copy16".as_ptr()) };
        let kernel = Self {
            context: Arc::clone(context),
            module: module.expose_provenance(),
            function: function.expose_provenance(),
        };
        check("cuModuleGetFunction", found).map(|()| kernel)
    }

    /// Copies `len` bytes, rounded up to 16, behind what is queued.
    ///
    /// # Safety
    /// So many bytes must be readable by the device at `from` and its own at `to`, until it is done.
    pub(super) unsafe fn copy(&self, on: &Queue, to: u64, from: *const u8, len: usize) -> Result<(), DeviceError> {
        let units = len.div_ceil(COPY_UNIT);
        let (mut to, mut from, mut n) = (to, from.expose_provenance() as u64, units as u64);
        let mut arguments: [*mut c_void; 3] = [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut n).cast()];
        let blocks = u32::try_from(units).unwrap_or(u32::MAX).div_ceil(COPY_THREADS).clamp(1, COPY_BLOCKS_MAX);
        let function = ptr::with_exposed_provenance_mut(self.function);
        // SAFETY: the function takes three 64-bit numbers, which the driver copies before it returns; the caller answers
        // for the memory.
        let result = unsafe {
            cu::cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                COPY_THREADS,
                1,
                1,
                0,
                on.raw(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result)
    }
}

impl Drop for CopyKernel {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the module is ours, and what ran in it was waited for.
            tell("cuModuleUnload", unsafe { cu::cuModuleUnload(ptr::with_exposed_provenance_mut(self.module)) });
        }
    }
}

/// Host memory that devices read and write by themselves.
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
pub(crate) struct Registration(usize);

impl Registration {
    /// Registers memory for all devices, which read it only.
    ///
    /// # Safety
    /// `len` bytes from `address` must stay mapped until this is dropped.
    pub(crate) unsafe fn new(address: *const u8, len: usize) -> Result<Self, DeviceError> {
        let flags = cu::CU_MEMHOSTREGISTER_PORTABLE | cu::CU_MEMHOSTREGISTER_READ_ONLY;
        // SAFETY: the caller's promise.
        let result = unsafe { cu::cuMemHostRegister_v2(address.cast_mut().cast(), len, flags) };
        check("cuMemHostRegister", result)?;
        Ok(Self(address.expose_provenance()))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: it was registered by us, once, and is still mapped.
        tell("cuMemHostUnregister", unsafe { cu::cuMemHostUnregister(ptr::with_exposed_provenance_mut(self.0)) });
    }
}
