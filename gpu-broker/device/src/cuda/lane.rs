//! Lanes of a CUDA device: where programs run, one at a time in each, and how a program is made of a run.
//!
//! A lane has a stream, scratch memory, and a stretch of device memory for inputs and outputs with its twin in pinned
//! host memory. All programs of a lane share them: their addresses are in the programs.

use std::{
    fmt,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use super::{
    CudaDevice, QUEUED_LOOKS_FOR, Stretch,
    arena::{self, Arena, Purpose, with_purpose},
    driver::Context,
    host_memory::Pinned,
    kernels::Work,
    placement::Placement,
    program::{Program, RunTimes},
    queue::{Event, Queue},
    registered::{Piece, Registered, UNIT, pieces},
};
use crate::{Device, DeviceError, RangeId, Stream};

/// Most bytes of inputs and outputs of one program.
pub const IO_BYTES_MAX: usize = 1 << 30;
/// Each input and output begins at a multiple of this in its lane's memory, which is theirs up to the next one.
pub const IO_ALIGN: usize = 256;
/// How long a run looks for its end once that is near.
const TAIL_LOOKS_FOR: Duration = Duration::from_micros(500);
/// How much earlier than needed a sleeper is woken: what timers are late by.
const WAKES_WITHIN: Duration = Duration::from_micros(150);
/// What a lane's pinned memory grows by.
const IO_GROW_BY: usize = 4 << 20;
/// Workspace of a lane for matrix products: what cuBLAS takes by itself on GPUs of this kind.
const WORKSPACE: usize = 32 << 20;
/// Outputs up to this size are copied by a kernel, which begins sooner than the copy engine does.
const OUTPUTS_BY_KERNEL: usize = 256 << 10;

/// One lane.
pub(super) struct Lane {
    pub(super) queue: Queue,
    /// Around all that a run has queued: between the two is what the device took, whenever anybody looked.
    begun: Event,
    done: Event,
    pub(super) scratch: Mutex<Arena>,
    /// For matrix products; empty until the first.
    workspace: Mutex<Arena>,
    /// Locked by whoever runs something in this lane.
    io: Mutex<Io>,
    io_base: u64,
}

struct Io {
    device: Arena,
    host: Pinned,
}

impl Lane {
    pub(super) fn new(context: &Arc<Context>, scratch_max: usize) -> Result<Self, DeviceError> {
        let device = Arena::new(context, IO_BYTES_MAX)?;
        Ok(Self {
            queue: Queue::new(context)?,
            begun: Event::timed(context)?,
            done: Event::timed(context)?,
            scratch: Mutex::new(Arena::new(context, scratch_max)?),
            workspace: Mutex::new(Arena::new(context, WORKSPACE)?),
            io_base: device.base(),
            io: Mutex::new(Io { device, host: Pinned::new(context, IO_GROW_BY)? }),
        })
    }

    pub(super) fn scratch(&self) -> MutexGuard<'_, Arena> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn workspace(&self) -> MutexGuard<'_, Arena> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where inputs and outputs may lie: base and length.
    pub(super) fn io_stretch(&self) -> Stretch {
        (self.io_base, IO_BYTES_MAX as u64)
    }

    fn io(&self) -> MutexGuard<'_, Io> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Constants of one model: device memory that lives as long as this.
pub struct Constants {
    device: Arc<super::Memory>,
    owner: u64,
}

impl Constants {
    pub(super) fn owner(&self) -> u64 {
        self.owner
    }
}

impl Drop for Constants {
    fn drop(&mut self) {
        self.device.give_up(self.owner);
    }
}

impl fmt::Debug for Constants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constants").field("owner", &self.owner).finish()
    }
}

impl CudaDevice {
    /// How many lanes there are for programs. Behind them are those for binding, and the device's own.
    pub fn lanes(&self) -> usize {
        self.memory.lanes.len() - self.memory.binding - 1
    }

    /// The lane for whatever is neither a program's nor a binding's.
    pub(super) fn own_lane(&self) -> usize {
        self.memory.lanes.len() - 1
    }

    pub(super) fn lane(&self, lane: usize) -> Result<&Lane, DeviceError> {
        self.memory.lanes.get(lane).ok_or(DeviceError::Invalid("there is no such lane"))
    }

    /// A lane's stream, for libraries that queue work there.
    pub fn stream(&self, lane: usize) -> Result<Stream, DeviceError> {
        Ok(Stream(self.lane(lane)?.queue.handle()))
    }

    /// Where a lane's inputs and outputs lie on the device. Sees to it that so many bytes are there.
    pub fn io_address(&self, lane: usize, len: usize) -> Result<usize, DeviceError> {
        let lane = self.lane(lane)?;
        let mut io = lane.io();
        io.device.grow(len)?;
        if io.host.len() < len {
            io.host = Pinned::new(&self.shared.context, len.next_multiple_of(IO_GROW_BY))?;
        }
        usize::try_from(lane.io_base).map_err(|_| DeviceError::Invalid("an address that does not fit"))
    }

    /// The workspace for matrix products of the lane that the calling thread works in: its address and size.
    pub fn products_workspace(&self) -> Result<Option<(usize, usize)>, DeviceError> {
        let Some(Purpose::Scratch(lane)) = arena::purpose() else { return Ok(None) };
        let mut workspace = self.lane(lane)?.workspace();
        self.shared.noted(workspace.grow(WORKSPACE))?;
        let address = usize::try_from(workspace.base());
        Ok(Some((address.map_err(|_| DeviceError::Invalid("an address that does not fit"))?, WORKSPACE)))
    }

    /// Memory for a model's constants: what is taken inside of [`CudaDevice::for_constants`] lives as long as this.
    pub fn constants(&self) -> Constants {
        Constants { device: Arc::clone(&self.memory), owner: self.memory.new_owner() }
    }

    /// Does work whose device memory is for these constants.
    pub fn for_constants<T>(&self, constants: &Constants, work: impl FnOnce() -> T) -> T {
        with_purpose(Purpose::Constants(constants.owner), work)
    }

    /// Does work in a lane, alone there, whose device memory is the lane's scratch.
    pub fn in_lane<T>(&self, lane: usize, work: impl FnOnce() -> T) -> Result<T, DeviceError> {
        Ok(self.alone_in(lane)?.run(work))
    }

    /// Waits until nobody else runs anything in a lane, and keeps it so. Not for those who keep weights where they are: whoever
    /// has the lane may wait for memory that these weights would leave.
    pub fn alone_in(&self, lane: usize) -> Result<Alone<'_>, DeviceError> {
        let io = self.lane(lane)?.io();
        self.shared.context.enter()?;
        Ok(Alone { lane, io })
    }

    /// Waits for what is queued in a lane.
    pub fn finish(&self, lane: usize) -> Result<(), DeviceError> {
        let lane = self.lane(lane)?;
        self.shared.context.enter()?;
        self.shared.noted(lane.queue.finish(&lane.done))
    }

    /// Sets the first bytes of a lane's inputs and outputs to zero: a model may use what it finds there as positions.
    pub fn clear_io(&self, lane: usize, len: usize) -> Result<(), DeviceError> {
        let base = self.lane(lane)?.io_base;
        self.shared.noted(self.shared.context.zero(base, len.max(1)))
    }

    /// Begins a run of a program: waits until its lane is free.
    pub fn begin<'d>(&'d self, program: &'d Program) -> Result<Run<'d>, DeviceError> {
        self.begin_in(self.alone_in(program.lane())?, program)
    }

    /// Begins a run of a program in its lane, which is the caller's already.
    pub fn begin_in<'d>(&'d self, alone: Alone<'d>, program: &'d Program) -> Result<Run<'d>, DeviceError> {
        if alone.lane != program.lane() {
            return Err(DeviceError::Invalid("the program is of another lane"));
        }
        Ok(Run {
            device: self,
            program,
            lane: self.lane(alone.lane)?,
            io: alone.io,
            in_place: Vec::new(),
            registered: PhantomData,
        })
    }
}

/// A lane that is the caller's until this is dropped.
pub struct Alone<'d> {
    lane: usize,
    io: MutexGuard<'d, Io>,
}

impl Alone<'_> {
    /// Which lane.
    pub fn lane(&self) -> usize {
        self.lane
    }

    /// Does work whose device memory is the lane's scratch.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        with_purpose(Purpose::Scratch(self.lane), work)
    }
}

impl fmt::Debug for Alone<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alone").field("lane", &self.lane).finish_non_exhaustive()
    }
}

/// A run of a program, alone in its lane.
pub struct Run<'d> {
    device: &'d CudaDevice,
    program: &'d Program,
    lane: &'d Lane,
    io: MutexGuard<'d, Io>,
    /// Inputs that are not in the lane's pinned memory, in order.
    in_place: Vec<Piece>,
    /// Where these are stays registered for as long.
    registered: PhantomData<&'d Registered>,
}

impl fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("program", self.program).finish_non_exhaustive()
    }
}

impl<'d> Run<'d> {
    /// Has an input, `len` bytes at `offset` of the lane's, read from an address of the host's in registered memory, without a
    /// copy to the lane's. False where it cannot be: then it must be written to [`Run::bytes`]. Inputs are told in order.
    ///
    /// Whoever else writes that memory may do so while it is read: see [`Registered`].
    pub fn read_in_place(
        &mut self,
        (offset, len): (usize, usize),
        memory: &'d Registered,
        address: usize,
    ) -> Result<bool, DeviceError> {
        self.stretch(offset, len.next_multiple_of(UNIT))?;
        let behind = self.in_place.last().is_none_or(|last| last.offset + last.len <= offset);
        if !offset.is_multiple_of(IO_ALIGN) || !behind {
            return Err(DeviceError::Invalid("an input that is not aligned, or comes out of order"));
        }
        let found = memory.find(address, len).filter(|_| len > 0 && self.device.memory.reads_registered);
        let Some(from) = found else { return Ok(false) };
        self.in_place.push(Piece { offset, len: len.next_multiple_of(UNIT), from: Some(from) });
        Ok(true)
    }

    fn stretch(&self, offset: usize, len: usize) -> Result<*mut u8, DeviceError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.io.host.len());
        if !inside {
            return Err(DeviceError::Invalid("an input or output outside of its lane's memory"));
        }
        Ok(self.io.host.as_ptr().wrapping_add(offset))
    }

    /// The host's twin of a stretch of inputs or outputs.
    pub fn bytes(&mut self, offset: usize, len: usize) -> Result<&mut [u8], DeviceError> {
        let at = self.stretch(offset, len)?;
        // SAFETY: the stretch lies in pinned memory of the lane, which was set when it was made. This run alone has it,
        // and copies are queued and awaited by its own methods.
        Ok(unsafe { std::slice::from_raw_parts_mut(at, len) })
    }

    /// Copies inputs to the device, from the lane's pinned memory or from where they are in place, launches the program's parts as soon as their weights' copies are queued, copies
    /// outputs back, and sleeps until they are there. `weights` names the range that they are in, and a group that must be there before
    /// the program begins, if there is one. Inputs and outputs are stretches: offset and length.
    pub fn go(
        &mut self,
        weights: Option<(RangeId, Option<u32>)>,
        inputs: (usize, usize),
        outputs: (usize, usize),
    ) -> Result<(), DeviceError> {
        let started = Instant::now();
        // The weights may not go while this runs.
        let _reading = weights.map(|(range, _)| self.device.shared.read(range)).transpose();
        let _reading = self.device.shared.noted(_reading)?;
        let swapping = weights.map_or(Ok(None), |(range, _)| self.device.late_copy(range));
        let swapping = self.device.shared.noted(swapping)?;
        self.device.shared.noted(self.lane.queue.record(&self.lane.begun))?;
        let begun = Instant::now();
        let went = self.queue_all(weights, inputs, outputs);
        let launched = Instant::now();
        // Also after a failure: what was queued uses memory that goes back with this run.
        let done = self.lane.queue.record(&self.lane.done).and_then(|()| self.wait(swapping.as_deref(), begun));
        let after = launched.elapsed();
        // Not when it was seen to end: who slept too long would go on to sleep as long.
        let took = done.and_then(|()| self.lane.done.since(&self.lane.begun));
        let times = RunTimes {
            until_first: went.as_ref().ok().copied().flatten().unwrap_or(launched) - started,
            until_launch: launched - started,
            after,
            on_device: took.as_ref().ok().copied().unwrap_or_default(),
        };
        self.program.took(times, took.as_ref().ok().copied().filter(|_| swapping.is_none()));
        self.device.shared.noted(went.and(took))?;
        Ok(())
    }

    /// Sleeps until the run is nearly done, then looks for its end, for a moment: waking up takes as long as a few
    /// layers. Nearly done is a little before the usual time, and not before nearly all weights are there.
    fn wait(&self, swapping: Option<&Event>, begun: Instant) -> Result<(), DeviceError> {
        if let Some(late) = swapping {
            late.wait()?;
        }
        thread::sleep(self.program.usual().saturating_sub(begun.elapsed()).saturating_sub(WAKES_WITHIN));
        if !self.lane.done.look(TAIL_LOOKS_FOR)? {
            self.lane.done.wait()?;
        }
        Ok(())
    }

    /// Runs the program without inputs and outputs and looks for its end: for measurements.
    pub fn time_alone(&mut self) -> Result<Duration, DeviceError> {
        let started = Instant::now();
        self.program.launch(&self.lane.queue, |range| self.placed(range), |_| Ok(()))?;
        self.lane.queue.record(&self.lane.done)?;
        while !self.lane.done.look(TAIL_LOOKS_FOR)? {}
        Ok(started.elapsed())
    }

    /// Where the weights are, or will be.
    fn placed(&self, range: RangeId) -> Result<Arc<Placement>, DeviceError> {
        self.device.shared.wait_placed(range, QUEUED_LOOKS_FOR)
    }

    /// Queues everything; tells when the first part was launched, if there are any.
    fn queue_all(
        &self,
        weights: Option<(RangeId, Option<u32>)>,
        inputs: (usize, usize),
        outputs: (usize, usize),
    ) -> Result<Option<Instant>, DeviceError> {
        for Piece { offset, len, from } in pieces(inputs, &self.in_place, IO_ALIGN) {
            let own = self.stretch(offset, len)?.expose_provenance() as u64;
            let (to, len) = (self.lane.io_base + offset as u64, len.next_multiple_of(UNIT));
            let work = Work::Copy { to, from: from.unwrap_or(own), len };
            // SAFETY: pinned memory of the lane, which nobody touches until `go` ends; it waits for the copy. Or memory that
            // stays registered until this run is dropped, and in which all of the padded stretch lies: others may write
            // there meanwhile, which makes other numbers of the input and nothing else. Both stretches of the lane are
            // padded to `IO_ALIGN`.
            unsafe { self.device.memory.kernels.queue(work, &self.lane.queue) }?;
        }
        if let Some((range, Some(first))) = weights {
            self.device.await_group(range, first, Stream(self.lane.queue.handle()))?;
        }
        let ready = |groups| weights.map_or(Ok(()), |(range, _)| self.device.wait_queued(range, groups));
        let first_launched = self.program.launch(&self.lane.queue, |range| self.placed(range), ready)?;
        let (to, from) = (self.stretch(outputs.0, outputs.1)?, self.lane.io_base + outputs.0 as u64);
        match outputs.1 {
            0 => {}
            1..=OUTPUTS_BY_KERNEL => {
                let (to, len) = (to.expose_provenance() as u64, outputs.1.next_multiple_of(UNIT));
                // SAFETY: as above.
                unsafe { self.device.memory.kernels.queue(Work::Copy { to, from, len }, &self.lane.queue) }?;
            }
            // SAFETY: as above.
            _ => unsafe { self.lane.queue.copy_out(to, from, outputs.1) }?,
        }
        Ok(first_launched)
    }
}
