//! Streams of work on a GPU, the events in them, and the graphs that are made of them.

use std::{
    ffi::c_uint,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::sys as cu;

use super::{
    drawn::Drawn,
    driver::{Context, check, tell},
    kernels::Kernels,
    rewrite::{Counts, Rewritten, rewrite},
};
use crate::DeviceError;

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

    pub(super) fn raw(&self) -> cu::CUevent {
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

    pub(super) fn raw(&self) -> cu::CUstream {
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

    /// Writes device memory, waits until it is there, and sees that it is: what is written so is seldom, and never looked at again. The
    /// driver's own waiting copy does not wait, where it reads pageable memory: then bytes may be on their way when it returns, and
    /// queues such as ours do not wait for them.
    pub(super) fn write(&self, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.context.enter()?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the slice stays until all is done; a wrong device address is an error of the driver's.
        unsafe { self.copy_in(to, from.as_ptr(), from.len()) }?;
        self.drain()?;
        let mut there = vec![0; from.len()];
        self.context.read(to, &mut there)?;
        if there == from {
            return Ok(());
        }
        let reason = "the device has other bytes than it was sent".to_owned();
        Err(DeviceError::Failed { call: "cuMemcpyHtoDAsync", reason })
    }

    /// Waits for all that is queued.
    fn drain(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is alive.
        check("cuStreamSynchronize", unsafe { cu::cuStreamSynchronize(self.raw()) })
    }

    /// Copies from another device whose memory this one can reach, behind what is queued.
    ///
    /// # Safety
    /// Both stretches must stay mapped, and what is read unchanged, until it is done.
    pub(super) unsafe fn copy_across(&self, to: u64, from: u64, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoDAsync", unsafe { cu::cuMemcpyDtoDAsync_v2(to, from, len, self.raw()) })
    }

    /// Copies from the device, behind what is queued.
    ///
    /// # Safety
    /// `len` bytes from `to` must stay ours alone until it is done.
    pub(super) unsafe fn copy_out(&self, to: *mut u8, from: u64, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoHAsync", unsafe { cu::cuMemcpyDtoHAsync_v2(to.cast(), from, len, self.raw()) })
    }

    /// Makes what is queued from now on wait for what was recorded last, also on another GPU.
    pub(super) fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: both handles are alive.
        check("cuStreamWaitEvent", unsafe { cu::cuStreamWaitEvent(self.raw(), event.raw(), 0) })
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

    /// The graph that was kept; its copies and fills are done by these kernels.
    pub(super) fn end_capture(&self, kernels: &Kernels) -> Result<(Drawn, Rewritten), DeviceError> {
        let mut graph = ptr::null_mut();
        // SAFETY: the handle is alive; the driver writes a handle, which is ours.
        check("cuStreamEndCapture", unsafe { cu::cuStreamEndCapture(self.raw(), &raw mut graph) })?;
        // SAFETY: the handle was just made, for nobody else.
        let drawn = unsafe { Drawn::own(&self.context, graph) };
        let rewritten = rewrite(&self.context, &drawn, kernels)?;
        Ok((drawn, rewritten))
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
    raw: usize,
    context: Arc<Context>,
    rewritten: Rewritten,
}

impl Graph {
    /// Makes it, and has the driver bring to the device what it needs there: all of it is there then, for it is launched and set by others.
    /// Kernels whose arguments are set before that take longer in all launches, some 0.2 us each on an H100, and the first launch
    /// more than twice as long.
    pub(super) fn of(drawn: &Drawn, rewritten: Rewritten, uploads: &Queue) -> Result<Self, DeviceError> {
        let raw = drawn.instantiate()?.expose_provenance();
        let graph = Self { raw, context: Arc::clone(&uploads.context), rewritten };
        // SAFETY: both handles are alive, and of one context.
        check("cuGraphUpload", unsafe { cu::cuGraphUpload(graph.raw(), uploads.raw()) })?;
        uploads.drain()?;
        Ok(graph)
    }

    pub(super) fn raw(&self) -> cu::CUgraphExec {
        ptr::with_exposed_provenance_mut(self.raw)
    }

    pub(super) fn counts(&self) -> Counts {
        self.rewritten.counts
    }

    pub(super) fn launch(&self, on: &Queue) -> Result<(), DeviceError> {
        // SAFETY: both handles are alive.
        let result = unsafe { cu::cuGraphLaunch(self.raw(), on.raw()) };
        check("cuGraphLaunch", result)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the handle is ours; the driver waits for launches that are under way.
            tell("cuGraphExecDestroy", unsafe { cu::cuGraphExecDestroy(self.raw()) });
        }
    }
}
