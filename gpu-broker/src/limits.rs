//! The limits that no one configures: each bounds a queue, a buffer or a wait of the broker itself.

use std::time::Duration;

use faaswap_protocol::Bytes;

/// Most connections at a time; the next one is closed at once.
pub const CONNECTIONS_MAX: usize = 8192;
/// Most connections that have not said hello; the oldest of them makes room, once it has had time for it.
pub const HALF_OPEN_MAX: usize = 256;
/// How long that is. The next connection waits meanwhile: after a restart all sidecars of a node come at once.
pub const HELLO_UNDISTURBED: Duration = Duration::from_millis(100);
/// How long a connection may take to say hello.
pub const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// Longest message before the hello.
pub const HELLO_BYTES_MAX: u32 = 1024;
/// Most bytes taken from a socket in one call.
pub const READ_BYTES: usize = 256 << 10;
/// Most bytes that wait for a peer to read them, beyond one largest frame.
pub const OUTBOX_BYTES_MAX: usize = 8 << 20;
/// How long a peer may read nothing while bytes wait for it.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);
/// How often stalled and idle things are looked for.
pub const HOUSEKEEPING_EVERY: Duration = Duration::from_secs(1);
/// Most functions that one connection may register.
pub const FUNCTIONS_PER_CONNECTION_MAX: usize = 4096;
/// Most registrations under way on one connection.
pub const CALLS_MAX: usize = 4096;
/// Most answers of one connection whose outputs were not released.
pub const UNRELEASED_MAX: usize = 4096;
/// Most bytes of inputs in flight on one connection without a slab.
pub const INLINE_BYTES_MAX: u64 = 512 << 20;
/// How often a registration that takes its time is told where it is.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Most rejected models that are remembered.
pub const REJECTED_MAX: usize = 1024;
/// How long a rejected model is remembered: what was at fault may have been this machine.
pub const REJECTED_FOR: Duration = Duration::from_secs(600);
/// Most uploads at a time on this node.
pub const UPLOADS_MAX: usize = 4;
/// Parts of an upload that wait to be written.
pub const UPLOAD_PARTS_QUEUED_MAX: usize = 2;
/// Models that are prepared by their kind at a time: it takes a few times their size of memory, and no device.
pub const SHARES_MAX: usize = 4;
/// Most models that are opened (read, copied to host memory, bound) at a time.
pub const LOADS_MAX: usize = 4;
/// The same for each worker: what binding takes of a process it takes of one worker.
pub const LOADS_PER_WORKER: usize = 2;
/// Reads of weights from disk at a time; a disk that is fast needs several to be so.
pub const WEIGHT_READS_IN_FLIGHT: usize = 4;
/// Most models that wait to be read from disk.
pub const FETCHES_QUEUED_MAX: usize = 1024;
/// Requests whose weights come from disk are scheduled when so much of them is left to be read: one part in so many.
pub const SCHEDULED_WITH_LEFT: usize = 8;
/// How long weights from disk wait for room in host memory, where others that are being copied take it.
pub const HOST_ROOM_WITHIN: Duration = Duration::from_secs(5);
/// Threads for work that blocks: uploads, loads, and what the runtime does itself.
pub const BLOCKING_THREADS_MAX: usize = UPLOADS_MAX + LOADS_MAX + LOADS_PER_WORKER * DEVICES_MAX + 4;
/// Most devices of a node.
pub const DEVICES_MAX: usize = 64;
/// Longest line that the preparing process may answer.
pub const PREPARE_ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Wanted size of the later groups of weights.
pub const GROUP_BYTES: u64 = 8 << 20;
/// Smallest response or request half that is given: less could not hold a tensor.
pub const SLAB_HALF_MIN: u64 = 4096;
/// Most bytes of slabs, in all, that GPUs read by themselves: such memory stays in the machine, used or not.
pub const SLABS_REGISTERED_MAX: Bytes = Bytes::mib(4096);
/// Most of one slab: 16 MiB hold a few large requests at a time, and sidecars take slots from the start.
pub const SLAB_REGISTERED_MAX: Bytes = Bytes::mib(16);
/// Slabs that wait to be registered or given back; beyond it they are asked for again, or given back by whoever has them.
pub const SLABS_QUEUED_MAX: usize = 1024;
/// How often the machine's GPUs are looked at; each look takes 40 ms a GPU, on a thread of its own.
pub const GPUS_LOOKED_AT_EVERY: Duration = Duration::from_secs(1);
/// How long there must have been nothing to do before a broker with lost devices starts anew to have them back.
pub const QUIET_FOR: Duration = Duration::from_secs(5);
/// How long a device that could not be opened anew is left alone; twice as long each time.
pub const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// At most so long.
pub const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Losses of devices within this time are of one fault.
pub const ONE_FAULT: Duration = Duration::from_secs(10);
/// Largest inputs of a request that may share a run: they are copied, with those of the others, below each other.
pub const BATCH_INPUT_BYTES_MAX: u64 = 4 << 20;
/// Most shapes, wanted outputs and numbers of requests whose trials are remembered of a model on a device.
pub const TRIALS_MAX: usize = 256;
/// Most bytes of outputs that a run of several requests may give.
pub const BATCH_OUTPUT_BYTES_MAX: Bytes = Bytes::mib(64);
/// Steps of the scheduler that wait to be written to a trace; where there are more, the trace ends.
pub const TRACE_QUEUED_MAX: usize = 32_768;
/// How often they are looked for.
pub const TRACE_WRITTEN_EVERY: Duration = Duration::from_millis(20);
/// How much of a trace is written at once.
pub const TRACE_WRITTEN_BYTES: usize = 256 << 10;
/// How long the broker waits, when it ends, for the last of a trace.
pub const TRACE_ENDED_WITHIN: Duration = Duration::from_secs(5);
/// Longest line of a trace that is read.
pub const TRACE_LINE_BYTES_MAX: u64 = 16 << 20;
/// How long a lane looks for its next run before it sleeps.
pub const LANE_LOOKS_FOR: Duration = Duration::from_micros(60);
/// How long the loop and a lane look for a request that was said to be about to come.
pub const EXPECTED_LOOKS_FOR: Duration = Duration::from_micros(100);

const _: () = assert!(SLAB_REGISTERED_MAX.get() <= SLABS_REGISTERED_MAX.get(), "one slab must fit");
