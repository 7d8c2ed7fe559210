//! One life of a worker, as the broker sees it: the process, what it is asked, and its end.

use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::sync_channel,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use faaswap_device::DeviceError;

use crate::{
    channel::Channel,
    message::{Answer, Call, Facts, FromWorker, Spec, ToWorker},
    wire::{Buffer, Wire},
};

/// The argument by which a program becomes a worker.
const ARGUMENT: &str = "worker";
/// How long a worker may take to open its device.
const OPENS_WITHIN: Duration = Duration::from_secs(120);

/// Told what a call gives.
type Told = Box<dyn FnOnce(Result<Answer, DeviceError>) + Send>;
/// Told of descriptors of chunks, and whom they are for.
pub(crate) type TellChunks = Box<dyn Fn(Option<u32>, Vec<OwnedFd>) + Send + Sync>;

/// A worker.
pub(crate) struct Life {
    /// Tells lives of all workers apart.
    pub(crate) number: u64,
    wire: Wire,
    /// Held while a message is sent, so that they are counted in their order.
    sending: Mutex<()>,
    /// How many were sent.
    sent: AtomicU64,
    calls: Mutex<Calls>,
    channels: Mutex<Vec<Channel>>,
    /// Theirs, also while they are used.
    lane_wires: Vec<Arc<Wire>>,
    lost: AtomicBool,
    pub(crate) mapped: AtomicU64,
    tell_chunks: TellChunks,
}

#[derive(Default)]
struct Calls {
    next: Call,
    /// Nobody answers any more.
    over: bool,
    told: HashMap<Call, Told>,
}

static LIVES: AtomicU64 = AtomicU64::new(1);

impl Life {
    /// Starts a worker and has it open its device. `tell_chunks` is called with what the worker shares of its pool. The thread ends
    /// once the process is gone.
    pub(crate) fn start(
        program: &Path,
        spec: &Spec,
        tell_chunks: TellChunks,
    ) -> Result<(Arc<Self>, Facts, JoinHandle<()>), DeviceError> {
        let (wire, socket) = Wire::pair().map_err(failed)?;
        let child = Command::new(program).arg(ARGUMENT).stdin(Stdio::from(socket)).process_group(0).spawn();
        let mut child = Process(child.map_err(failed)?);
        let facts = introduce(&wire, spec)?;
        let channels = (0..spec.lanes).map(|_| lane(&wire, spec)).collect::<Result<Vec<_>, _>>()?;
        // What was said until now: the device, and its lanes.
        let sent = 1 + u64::from(spec.lanes);
        let life = Arc::new(Self {
            number: LIVES.fetch_add(1, Ordering::Relaxed),
            wire,
            sending: Mutex::default(),
            sent: AtomicU64::new(sent),
            calls: Mutex::default(),
            lane_wires: channels.iter().map(|channel| Arc::clone(&channel.wire)).collect(),
            channels: Mutex::new(channels),
            lost: AtomicBool::new(false),
            mapped: AtomicU64::new(0),
            tell_chunks,
        });
        let (listener, name) = (Arc::clone(&life), format!("from-{}", spec.device.name()));
        let listen = move || {
            listener.listen();
            child.end();
        };
        let thread = thread::Builder::new().name(name).spawn(listen).map_err(failed)?;
        Ok((life, facts, thread))
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Ends it, as it is. Whoever waits for it hears of that at once.
    pub(crate) fn end(&self) {
        self.lost.store(true, Ordering::Release);
        self.wire.shut_down();
        self.lane_wires.iter().for_each(|wire| wire.shut_down());
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something. A worker that does not listen is of no more use.
    pub(crate) fn say(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        self.offer(message, fds).map_err(|error| {
            if !self.is_lost() {
                tracing::error!(%error, "a device's process does not listen: it is given up");
                self.end();
            }
            DeviceError::Lost
        })
    }

    /// Says something that the worker can do without.
    pub(crate) fn offer(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.is_lost() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let _alone = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        self.wire.send(message, fds)?;
        self.sent.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Asks for something; `told` is called with what it gives, in any case where this is well.
    pub(crate) fn call(&self, message: impl FnOnce(Call) -> ToWorker, told: Told) -> Result<(), DeviceError> {
        let call = {
            let mut calls = self.calls();
            if calls.over {
                return Err(DeviceError::Lost);
            }
            calls.next += 1;
            let call = calls.next;
            calls.told.insert(call, told);
            call
        };
        let said = self.say(&message(call), &[]);
        if said.is_err() && self.calls().told.remove(&call).is_none() {
            // Whoever waits was told by the end of the worker.
            return Ok(());
        }
        said
    }

    /// Asks for something and waits for what it gives.
    pub(crate) fn ask(&self, message: impl FnOnce(Call) -> ToWorker) -> Result<Answer, DeviceError> {
        let (tell, told) = sync_channel(1);
        // Nobody else takes what is told.
        self.call(message, Box::new(move |answer| drop(tell.send(answer))))?;
        told.recv().unwrap_or(Err(DeviceError::Lost))
    }

    /// Does something with a lane's channel, of which there are as many as lanes.
    pub(crate) fn with_channel<R>(&self, work: impl FnOnce(&mut Channel, u64) -> R) -> Option<R> {
        let channels = || self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let mut channel = channels().pop()?;
        let done = work(&mut channel, self.sent.load(Ordering::Acquire));
        if channel.is_cut {
            // Whoever hears of this run's end asks at once whether the device is lost.
            self.end();
        }
        channels().push(channel);
        Some(done)
    }

    /// Wakes the lane that the next run goes to.
    pub(crate) fn expect_run(&self) {
        if let Some(channel) = self.channels.lock().unwrap_or_else(PoisonError::into_inner).last() {
            channel.look();
        }
    }

    /// Until the worker ends.
    fn listen(&self) {
        let (mut buffer, mut fds) = (Buffer::default(), Vec::new());
        loop {
            match self.wire.receive(&mut buffer, &mut fds, Duration::ZERO) {
                Ok(Some(FromWorker::Ended { call, result })) => {
                    let told = self.calls().told.remove(&call);
                    match told {
                        Some(told) => told(result.map_err(DeviceError::from)),
                        None => tracing::error!(call, "a device's process answers what nobody has asked"),
                    }
                }
                Ok(Some(FromWorker::Chunks { to })) => (self.tell_chunks)(to, std::mem::take(&mut fds)),
                Ok(Some(FromWorker::Opened(_) | FromWorker::Failed(_))) => {
                    tracing::error!("a device's process says twice that it is open");
                    break;
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "a device's process says what is not understood");
                    break;
                }
            }
        }
        self.end();
        let told = {
            let mut calls = self.calls();
            calls.over = true;
            std::mem::take(&mut calls.told)
        };
        told.into_values().for_each(|told| told(Err(DeviceError::Lost)));
    }
}

impl std::fmt::Debug for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Life").field("number", &self.number).field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// A child that does not outlive this.
struct Process(Child);

impl Process {
    /// Until it is gone, and with it what it had on its device.
    fn end(&mut self) {
        // Fails only where it has ended.
        let _ = self.0.kill();
        match self.0.wait() {
            Ok(status) => tracing::info!(%status, "a device's process has ended"),
            Err(error) => tracing::error!(%error, "a device's process cannot be waited for"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

fn introduce(wire: &Wire, spec: &Spec) -> Result<Facts, DeviceError> {
    wire.send(&ToWorker::Open(Box::new(spec.clone())), &[]).map_err(failed)?;
    if !wire.is_readable_within(OPENS_WITHIN).map_err(failed)? {
        return Err(failed(io::Error::other(format!("it does not open its device in {OPENS_WITHIN:?}"))));
    }
    match wire.receive(&mut Buffer::default(), &mut Vec::new(), Duration::ZERO).map_err(failed)? {
        Some(FromWorker::Opened(facts)) => Ok(facts),
        Some(FromWorker::Failed(reason)) => Err(failed(io::Error::other(reason))),
        Some(FromWorker::Ended { .. } | FromWorker::Chunks { .. }) | None => {
            Err(failed(io::Error::other("it ended before its device was open")))
        }
    }
}

fn lane(wire: &Wire, spec: &Spec) -> Result<Channel, DeviceError> {
    let (channel, [socket, memory]) = Channel::new(spec.exchange)?;
    wire.send(&ToWorker::Lane, &[socket.as_fd(), memory.as_fd()]).map_err(failed)?;
    Ok(channel)
}

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn failed(error: io::Error) -> DeviceError {
    DeviceError::Failed { call: "starting the device's process", reason: error.to_string() }
}
