//! Every bound of the sidecar, named: queues, waits, retries and buffers.
//!
//! Limits that both ends of a broker connection share stand in `faaswap_protocol::limits`; what an operator sets
//! stands in `config`. Here is what neither of them decides.

use std::time::Duration;

use faaswap_protocol::Bytes;

/// Requests that may wait for the broker or for room in the slab; the next one is refused.
pub const WAITING_MAX: usize = 1024;
/// Requests in flight on one broker connection. The broker would refuse more.
pub const IN_FLIGHT_MAX: usize = faaswap_protocol::limits::REQUESTS_IN_FLIGHT_MAX;
/// First pause before the broker is dialled again; doubles with each failure.
pub const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause before the broker is dialled again. A pause is drawn between half of this and all of it.
pub const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a connection attempt to one address may take.
pub const DIAL_WITHIN: Duration = Duration::from_secs(2);
/// How long the broker may take to answer a hello.
pub const WELCOME_WITHIN: Duration = Duration::from_secs(5);
/// How long a broker that works on a registration may be silent; it speaks at least every two seconds.
pub const REGISTER_SILENCE_MAX: Duration = Duration::from_secs(20);
/// How long the broker may take to check and store an uploaded model.
pub const UPLOAD_ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// Uploads tried on one connection before the broker is believed to be confused.
pub const UPLOADS_MAX: u32 = 2;
/// A function that the broker cannot take now for a passing reason is registered again after this pause.
pub const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Times that one request is sent to a broker. More than one, because brokers restart; bounded, because it may be the
/// request that kills them.
pub const SENDS_MAX: u32 = 3;
/// How often a broker connection with requests in flight is probed.
pub const PING_EVERY: Duration = Duration::from_secs(5);
/// How often an idle broker connection is probed: seldom, there may be a thousand on a node.
pub const PING_IDLE_EVERY: Duration = Duration::from_secs(60);
/// A broker that has said nothing for so long is taken for dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Most bytes that one read from the broker takes in before they are looked at.
pub const READ_BYTES: usize = 16 << 10;
/// Most pieces handed to the kernel in one write.
pub const WRITE_PIECES_MAX: usize = 64;
/// Most regular files that are looked at in a model's folder.
pub const FOLDER_FILES_MAX: usize = 256;

/// How large a model on a server may be where nothing is said, all its files together.
pub const FETCH_BYTES_DEFAULT: Bytes = Bytes::mib(8192);
/// How long a connection to a model's server may take.
pub const FETCH_CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long the server may take to begin its reply.
pub const FETCH_HEAD_WITHIN: Duration = Duration::from_secs(30);
/// How long the server may send nothing in the middle of a file.
pub const FETCH_SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long all files of a model may take, failures and pauses included.
pub const FETCH_WITHIN: Duration = Duration::from_secs(3600);
/// Redirects followed from one URL.
pub const FETCH_REDIRECTS_MAX: usize = 5;
/// Failures in a row after which a fetch is given up.
pub const FETCH_TRIES_MAX: u32 = 6;
/// So much must come between two failures for them not to be in a row.
pub const FETCH_ADVANCE_MIN: u64 = 1 << 20;
/// First pause after a failure; doubles with each.
pub const FETCH_PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause between two tries of one fetch.
pub const FETCH_PAUSE_MAX: Duration = Duration::from_secs(30);
/// First pause after a fetch was given up; doubles with each.
pub const FETCH_AGAIN_MIN: Duration = Duration::from_secs(10);
/// Longest pause before a model is fetched again, and the one where finding out costs the whole model.
pub const FETCH_AGAIN_MAX: Duration = Duration::from_secs(600);
/// Pieces of a file that wait to be written.
pub const FETCH_PIECES_MAX: usize = 8;
/// How often a fetch says in the log how far it is.
pub const FETCH_SAID_EVERY: Duration = Duration::from_secs(5);

/// Pixels of the largest image that is decoded, and of all that are decoded at one time. One takes nine bytes at most while it is.
pub const IMAGE_PIXELS_MAX: u64 = 16 << 20;
/// Memory beside the pixels that a PNG may take to decode: a row or two, and its chunks.
pub const IMAGE_SCRATCH_BYTES_MAX: usize = 64 << 20;
/// Scans of a progressive JPEG: each goes over the whole image.
pub const IMAGE_SCANS_MAX: usize = 64;
/// Largest side that images are brought to.
pub const IMAGE_SIDE_MAX: u32 = 4096;
/// Longest file with names of labels.
pub const LABELS_BYTES_MAX: u64 = 4 << 20;
/// Most labels in one answer.
pub const LABELS_TOP_MAX: u64 = 1000;

/// Longest hint of who stands before the pod.
pub const HINT_BYTES_MAX: usize = 4 << 10;

/// Client connections that may be open; the next one waits in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests of clients in work; the next one is refused.
pub const REQUESTS_MAX: usize = 2048;
/// Connections to the metrics port.
pub const METRICS_CONNECTIONS_MAX: usize = 32;
/// How long a new connection may take to its first request.
pub const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// How long an HTTP/1 connection may be idle, or take to send a later request's head. Above what common clients keep
/// idle connections for, so that they and not we close.
pub const HEAD_WITHIN: Duration = Duration::from_secs(95);
/// Answers of one gRPC stream that its client has not taken.
pub const STREAM_ANSWERS_MAX: usize = 4;
/// How long a client's request body may stand still.
pub const BODY_SILENCE_MAX: Duration = Duration::from_secs(15);
/// How long the rest of a body is read that nobody wants, so that its client sees the reply.
pub const LINGER_WITHIN: Duration = Duration::from_secs(5);
/// How many bytes of such a body are read.
pub const LINGER_BYTES_MAX: usize = 256 << 20;
/// How long a whole request body may take.
pub const BODY_WITHIN: Duration = Duration::from_secs(120);
/// How long an HTTP/2 client may leave a ping unanswered.
pub const HTTP2_PING_WITHIN: Duration = Duration::from_secs(20);
/// How often a silent HTTP/2 client is probed.
pub const HTTP2_PING_EVERY: Duration = Duration::from_secs(30);
/// Requests in flight on one HTTP/2 connection.
pub const HTTP2_STREAMS_MAX: u32 = 256;
/// Bytes of one HTTP/2 stream on their way to us.
pub const HTTP2_STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of one HTTP/2 connection on their way to us.
pub const HTTP2_CONNECTION_WINDOW: u32 = 4 << 20;
/// Largest HTTP/2 frame taken.
pub const HTTP2_FRAME_MAX: u32 = 256 << 10;
/// Bytes of headers in one HTTP/2 request.
pub const HTTP2_HEADERS_MAX: u32 = 32 << 10;
/// Read buffer of an HTTP/1 connection at its largest; a request's head must fit too. Below what musl's allocator maps and
/// unmaps each time: with 512 KiB the static program added 0.4 ms more to a body of 600 kB.
pub const HTTP1_BUFFER_MAX: usize = 124 << 10;
/// Header lines in one HTTP/1 request.
pub const HTTP1_HEADERS_MAX: usize = 100;
/// Bodies from here on are parsed or (de)compressed off the event loop, so that others are not kept waiting.
pub const HEAVY_BYTES: usize = 256 << 10;
/// Heavy bodies worked on at one time.
pub const HEAVY_THREADS_MAX: usize = 2;
/// Threads for what may block: files, name look-ups, heavy bodies.
pub const BLOCKING_THREADS_MAX: usize = 6;
/// Request bodies of the largest size that may be in memory together.
pub const BODIES_OF_MAX_SIZE: usize = 4;
/// Inputs of at least so many bytes are announced to the broker before they are written.
pub const ANNOUNCED_FROM: u64 = 128 << 10;
/// A body that streams in is announced where the function has not been asked for so long: its weights may have left.
pub const ANNOUNCED_AFTER: Duration = Duration::from_millis(500);
/// How long an answer is looked for before its request sleeps, and the longest work of the broker's for which that is done.
pub const LOOKED_FOR_MAX: Duration = Duration::from_micros(150);
/// What a client that is told to come back should wait, in seconds.
pub const RETRY_AFTER_S: u64 = 1;
/// Idle connections kept to the handler behind the sidecar.
pub const UPSTREAM_IDLE_MAX: usize = 32;
/// How long an idle connection to the handler is kept. Go's servers of the of-watchdog family close at 500 ms.
pub const UPSTREAM_IDLE_WITHIN: Duration = Duration::from_millis(400);
/// How long a stopping sidecar lets requests in flight finish.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(25);
/// How long a handler may take to end once everything is answered; then it is killed.
pub const HANDLER_END_WITHIN: Duration = Duration::from_secs(2);
/// How long a handler may take to accept the connection that asks whether it is there.
pub const HANDLER_PROBE_WITHIN: Duration = Duration::from_millis(500);
/// Pause after a failed accept: out of descriptors gets better only when others close.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const _: () = assert!(RECONNECT_PAUSE_MAX.as_millis() < 3000, "service resumes within 3 s of the broker's return");
const _: () = assert!(PING_EVERY.as_millis() * 2 < SILENCE_MAX.as_millis(), "one lost ping is no death");
const _: () = assert!(IN_FLIGHT_MAX + WAITING_MAX <= REQUESTS_MAX, "every request in the broker client has a client");
