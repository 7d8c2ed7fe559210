//! A broker that speaks the protocol and runs one model: each output is its input, floats doubled.

use std::{
    collections::HashMap,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use faaswap_protocol::{
    Bytes, CallId, DType, Dim, FromBroker, FunctionId, ModelDigest, Refusal, RequestId, Signature, SlabLayout, Span,
    TensorSlice, TensorSpec, Timing, ToBroker, Transport, wire,
};
use faaswap_sidecar::broker::Target;
use faaswap_slab::{Slab, SlotAllocator, fds};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
    task::JoinSet,
};

/// What every answer says of its time.
pub const TIMING: Timing = Timing {
    queued: Duration::from_micros(11),
    ran: Duration::from_micros(22),
    swapping: Duration::from_micros(33),
    was_resident: false,
};

/// What the broker does with requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    Answer,
    /// Keeps requests until the mood changes.
    Hold,
    /// Ends registrations once it is told to hurry.
    Slow,
    Refuse(Refusal),
}

/// What the broker has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub connections: usize,
    pub registered: usize,
    pub uploads: usize,
    pub requests: usize,
    pub cancelled: usize,
    pub released: usize,
    /// Hints that a request is about to come.
    pub expected: usize,
    /// The time left of the last request.
    pub time_left: Option<Duration>,
    /// Where the last request's inputs lay.
    pub inputs: Vec<TensorSlice>,
}

#[derive(Debug)]
struct Shared {
    signature: Signature,
    /// What registrations are answered.
    registration: Mutex<Result<(), Refusal>>,
    /// Models that need no upload.
    models: Mutex<Vec<ModelDigest>>,
    mood: watch::Sender<Mood>,
    seen: watch::Sender<Seen>,
}

/// The broker; dropped, it is gone like one that was killed.
pub struct FakeBroker {
    shared: Arc<Shared>,
    target: Target,
    accepting: tokio::task::JoinHandle<()>,
    folder: Option<tempfile::TempDir>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One input `x FP32[-1,4]` and one output `y` of the same shape.
pub fn doubler() -> Signature {
    let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::F32, dims: vec![Dim::Any, Dim::Fixed(4)] };
    Signature { inputs: vec![spec("x")], outputs: vec![spec("y")] }
}

/// Three inputs and outputs of several types.
pub fn mixed() -> Signature {
    let spec = |name: &str, dtype, dims: &[Dim]| TensorSpec { name: name.into(), dtype, dims: dims.into() };
    let all = |suffix: &str| {
        vec![
            spec(&format!("ids{suffix}"), DType::I64, &[Dim::Any]),
            spec(&format!("mask{suffix}"), DType::Bool, &[Dim::Any]),
            spec(&format!("half{suffix}"), DType::F16, &[Dim::Fixed(2)]),
        ]
    };
    Signature { inputs: all(""), outputs: all("_out") }
}

impl FakeBroker {
    fn shared(signature: Signature) -> Arc<Shared> {
        Arc::new(Shared {
            signature,
            registration: Mutex::new(Ok(())),
            models: Mutex::new(vec![super::digest()]),
            mood: watch::Sender::new(Mood::Answer),
            seen: watch::Sender::new(Seen::default()),
        })
    }

    /// A broker on a Unix socket of its own.
    pub fn start(signature: Signature) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.sock");
        let mut broker = Self::at(&path, signature);
        broker.folder = Some(folder);
        broker
    }

    /// A broker on this Unix socket; what an earlier one left there is taken away.
    pub fn at(path: &Path, signature: Signature) -> Self {
        let shared = Self::shared(signature);
        let _absent = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let accepting = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                let mut open = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    open.spawn(serve(Arc::clone(&shared), Conn::Unix(stream)));
                }
            }
        });
        Self { shared, target: Target::Socket(path.to_owned()), accepting, folder: None }
    }

    /// A broker on a TCP port.
    pub async fn start_tcp(signature: Signature) -> Self {
        let shared = Self::shared(signature);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::Address(listener.local_addr().unwrap().to_string());
        let accepting = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                let mut open = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    open.spawn(serve(Arc::clone(&shared), Conn::Tcp(stream)));
                }
            }
        });
        Self { shared, target, accepting, folder: None }
    }

    pub fn target(&self) -> Target {
        self.target.clone()
    }

    pub fn socket(&self) -> PathBuf {
        match &self.target {
            Target::Socket(path) => path.clone(),
            Target::Address(address) => panic!("{address} is no Unix socket"),
        }
    }

    /// Kills the broker and waits until its connections are gone; the socket's file stays, as after a crash.
    pub async fn kill(mut self) {
        self.accepting.abort();
        let _aborted = (&mut self.accepting).await;
    }

    pub fn set_mood(&self, mood: Mood) {
        self.shared.mood.send_replace(mood);
    }

    /// From now on registrations are answered so.
    pub fn register_with(&self, answer: Result<(), Refusal>) {
        *self.shared.registration.lock().unwrap() = answer;
    }

    /// Forgets all models, so that they have to be uploaded.
    pub fn forget_models(&self) {
        self.shared.models.lock().unwrap().clear();
    }

    /// Has the models again that it begins with.
    pub fn knows_again(&self) {
        self.shared.models.lock().unwrap().push(super::digest());
    }

    /// Waits until the broker has seen something.
    pub async fn until(&self, fulfilled: impl FnMut(&Seen) -> bool) -> Seen {
        let mut seen = self.shared.seen.subscribe();
        tokio::time::timeout(Duration::from_secs(20), seen.wait_for(fulfilled)).await.expect("in time").unwrap().clone()
    }

    pub fn seen(&self) -> Seen {
        self.shared.seen.borrow().clone()
    }
}

enum Conn {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Conn {
    async fn read(&mut self, fds_in: &mut Vec<OwnedFd>) -> io::Result<Vec<u8>> {
        let mut chunk = vec![0; 64 << 10];
        let read = match self {
            Self::Unix(stream) => {
                stream.async_io(Interest::READABLE, || fds::recv(&*stream, &mut chunk, fds_in, 32)).await?
            }
            Self::Tcp(stream) => stream.read(&mut chunk).await?,
        };
        chunk.truncate(read);
        Ok(chunk)
    }

    async fn write(&mut self, bytes: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                let mut sent = 0;
                if let Some(fd) = fd {
                    let send = || fds::send(&*stream, bytes, &[fd.as_fd()]);
                    sent = stream.async_io(Interest::WRITABLE, send).await?;
                }
                stream.write_all(&bytes[sent..]).await
            }
            Self::Tcp(stream) => stream.write_all(bytes).await,
        }
    }
}

struct Peer {
    shared: Arc<Shared>,
    conn: Conn,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
    slab: Option<Slab>,
    slots: SlotAllocator,
    /// Outputs that were not released.
    out: HashMap<RequestId, Vec<Span>>,
    held: Vec<(ToBroker, Vec<u8>)>,
    upload: Option<(CallId, ModelDigest, u64, Vec<u8>)>,
}

async fn serve(shared: Arc<Shared>, conn: Conn) -> io::Result<()> {
    shared.seen.send_modify(|seen| seen.connections += 1);
    let mut mood = shared.mood.subscribe();
    let (slots, fds) = (SlotAllocator::new(0, 0), Vec::new());
    let mut peer = Peer {
        shared,
        conn,
        buffer: Vec::new(),
        fds,
        slab: None,
        slots,
        out: HashMap::new(),
        held: Vec::new(),
        upload: None,
    };
    loop {
        tokio::select! {
            chunk = peer.conn.read(&mut peer.fds) => {
                let chunk = chunk?;
                if chunk.is_empty() {
                    return Ok(());
                }
                peer.buffer.extend_from_slice(&chunk);
                while let Some((message, payload)) = peer.take() {
                    peer.hear(message, payload).await?;
                }
            }
            _ = mood.changed() => {
                for (message, payload) in std::mem::take(&mut peer.held) {
                    peer.infer(message, payload).await?;
                }
            }
        }
    }
}

impl Peer {
    fn take(&mut self) -> Option<(ToBroker, Vec<u8>)> {
        let head = wire::Head::decode(*self.buffer.first_chunk()?).expect("a frame");
        let (message_len, payload_len) = (head.message_len as usize, head.payload_len as usize);
        let end = wire::HEAD_LEN + message_len;
        let mut frame: Vec<u8> = {
            self.buffer.get(..end + payload_len)?;
            self.buffer.drain(..end + payload_len).collect()
        };
        let payload = frame.split_off(end);
        Some((wire::decode(&frame[wire::HEAD_LEN..]).expect("a message"), payload))
    }

    async fn say(&mut self, message: FromBroker) -> io::Result<()> {
        self.say_with(message, &[], None).await
    }

    async fn say_with(&mut self, message: FromBroker, payload: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
        let mut frame = Vec::new();
        wire::encode(&message, payload.len().try_into().unwrap(), &mut frame).unwrap();
        frame.extend_from_slice(payload);
        self.conn.write(&frame, fd).await
    }

    async fn hear(&mut self, message: ToBroker, payload: Vec<u8>) -> io::Result<()> {
        match message {
            ToBroker::Hello { version, transport: Transport::Slab { request, response }, .. } => {
                let layout = SlabLayout { request, response };
                let (slab, fd) = Slab::create(layout).unwrap();
                self.slab = Some(slab);
                self.slots = SlotAllocator::new(request.get(), response.get());
                self.say_with(FromBroker::Welcome { version, slab: Some(layout) }, &[], Some(fd)).await
            }
            ToBroker::Hello { version, transport: Transport::Inline, .. } => {
                self.say(FromBroker::Welcome { version, slab: None }).await
            }
            ToBroker::Register { call, function } => self.register(call, function.model).await,
            ToBroker::Upload { call, model, files } => {
                let len = files.iter().map(|file| file.len.get()).sum();
                let mut bytes = Vec::new();
                for fd in std::mem::take(&mut self.fds) {
                    std::fs::File::from(fd).read_to_end(&mut bytes)?;
                }
                self.upload = Some((call, model, len, bytes));
                self.finish_upload().await
            }
            ToBroker::UploadPart { .. } => {
                self.upload.as_mut().expect("an upload").3.extend_from_slice(&payload);
                self.finish_upload().await
            }
            ToBroker::Infer { .. } => self.infer(message, payload).await,
            ToBroker::Cancel { request } => {
                self.shared.seen.send_modify(|seen| seen.cancelled += 1);
                let is_it =
                    |held: &(ToBroker, Vec<u8>)| matches!(held.0, ToBroker::Infer { request: id, .. } if id == request);
                if let Some(at) = self.held.iter().position(is_it) {
                    self.held.remove(at);
                    self.say(FromBroker::Refused { request, refusal: Refusal::Cancelled }).await?;
                }
                Ok(())
            }
            ToBroker::Release { request } => {
                for span in self.out.remove(&request).expect("an answer that was not released") {
                    self.slots.free(span).unwrap();
                }
                self.shared.seen.send_modify(|seen| seen.released += 1);
                Ok(())
            }
            ToBroker::Ping { nonce } => self.say(FromBroker::Pong { nonce }).await,
            ToBroker::Expect { function, .. } => {
                assert_eq!(function, FunctionId(3));
                self.shared.seen.send_modify(|seen| seen.expected += 1);
                Ok(())
            }
            ToBroker::Hurry { call } if *self.shared.mood.borrow() == Mood::Slow => self.registered(call).await,
            ToBroker::Hurry { .. } | ToBroker::Unregister { .. } => Ok(()),
        }
    }

    async fn register(&mut self, call: CallId, model: ModelDigest) -> io::Result<()> {
        let answer = self.shared.registration.lock().unwrap().clone();
        if let Err(refusal) = answer {
            return self.say(FromBroker::CallRefused { call, refusal }).await;
        }
        if !self.shared.models.lock().unwrap().contains(&model) {
            return self.say(FromBroker::ModelNeeded { call }).await;
        }
        self.say(FromBroker::Preparing { call, stage: "binding".into() }).await?;
        if *self.shared.mood.borrow() == Mood::Slow {
            return Ok(());
        }
        self.registered(call).await
    }

    async fn registered(&mut self, call: CallId) -> io::Result<()> {
        let signature = self.shared.signature.clone();
        self.say(FromBroker::Registered { call, function: FunctionId(3), signature, weights: Bytes::mib(5) }).await?;
        self.shared.seen.send_modify(|seen| seen.registered += 1);
        Ok(())
    }

    async fn finish_upload(&mut self) -> io::Result<()> {
        let Some((call, model, len, bytes)) = self.upload.take_if(|(.., len, bytes)| *len == bytes.len() as u64) else {
            return Ok(());
        };
        assert_eq!(len, bytes.len() as u64);
        if ModelDigest(Sha256::digest(&bytes).into()) != model {
            let refusal = Refusal::UploadFailed { reason: "another model came".into() };
            return self.say(FromBroker::CallRefused { call, refusal }).await;
        }
        self.shared.models.lock().unwrap().push(model);
        self.shared.seen.send_modify(|seen| seen.uploads += 1);
        self.say(FromBroker::Uploaded { call }).await
    }

    async fn infer(&mut self, message: ToBroker, payload: Vec<u8>) -> io::Result<()> {
        let ToBroker::Infer { request, inputs, outputs, time_left, function } = &message else {
            panic!("{message:?}");
        };
        assert_eq!(*function, FunctionId(3));
        let mood = self.shared.mood.borrow().clone();
        let (request, time_left) = (*request, *time_left);
        let note = |seen: &mut Seen| {
            seen.requests += 1;
            seen.time_left = time_left;
            seen.inputs.clone_from(inputs);
        };
        match mood {
            Mood::Hold => {
                self.shared.seen.send_modify(note);
                self.held.push((message, payload));
                return Ok(());
            }
            Mood::Refuse(refusal) => {
                self.shared.seen.send_modify(note);
                return self.say(FromBroker::Refused { request, refusal }).await;
            }
            Mood::Answer | Mood::Slow => self.shared.seen.send_modify(note),
        }
        let all: Vec<u16> = (0..inputs.len().try_into().unwrap()).collect();
        let wanted = if outputs.is_empty() { &all } else { outputs };
        let mut slices = Vec::new();
        let mut out_payload = Vec::new();
        let mut spans = Vec::new();
        for &index in wanted {
            let input = inputs.iter().find(|input| input.index == index).expect("every input comes");
            let bytes = doubled(input.dtype, &self.bytes_of(input, &payload));
            let len = bytes.len() as u64;
            let span = match &self.slab {
                Some(slab) => {
                    let Some(span) = self.slots.allocate(len) else {
                        let refusal = Refusal::SlabFull { needed: Bytes::new(len), size: slab.layout().response };
                        return self.say(FromBroker::Refused { request, refusal }).await;
                    };
                    slab.response_region(span).unwrap().write(0, &bytes).unwrap();
                    spans.push(span);
                    span
                }
                None => {
                    out_payload.resize(out_payload.len().next_multiple_of(64), 0);
                    let span = Span { offset: out_payload.len() as u64, len };
                    out_payload.extend_from_slice(&bytes);
                    span
                }
            };
            slices.push(TensorSlice { index, dtype: input.dtype, shape: input.shape.clone(), span });
        }
        if self.slab.is_some() {
            self.out.insert(request, spans);
        }
        self.say_with(FromBroker::Answer { request, outputs: slices, timing: TIMING }, &out_payload, None).await
    }

    fn bytes_of(&self, input: &TensorSlice, payload: &[u8]) -> Vec<u8> {
        let Span { offset, len } = input.span;
        assert_eq!(Ok(Bytes::new(len)), input.shape.size(input.dtype));
        let (offset, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        match &self.slab {
            Some(slab) => {
                let mut bytes = vec![0; len];
                slab.request_region(input.span).unwrap().read(0, &mut bytes).unwrap();
                bytes
            }
            None => payload[offset..offset + len].to_vec(),
        }
    }
}

fn doubled(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    if dtype != DType::F32 {
        return bytes.to_vec();
    }
    let (floats, _) = bytes.as_chunks::<4>();
    floats.iter().flat_map(|float| (2.0 * f32::from_le_bytes(*float)).to_le_bytes()).collect()
}
