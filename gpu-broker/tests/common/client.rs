//! A client that speaks the protocol frame by frame, so that it can also misspeak.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use faaswap_protocol::{
    Bytes, CallId, DType, FromBroker, FunctionId, FunctionSpec, ModelDigest, ModelFile, Refusal, RequestId, Shape,
    Signature, Span, TensorSlice, Timing, ToBroker, Transport, limits::WIRE_VERSION, wire,
};
use faaswap_slab::{Slab, fds};

use super::{Broker, PATIENCE, digest, spec};

pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// One connection, used by one thread.
pub struct Client {
    pub stream: Stream,
    pub slab: Option<Slab>,
    kept: Vec<u8>,
    fds: Vec<OwnedFd>,
    next: u64,
}

pub struct Answer {
    pub outputs: Vec<(TensorSlice, Vec<u8>)>,
    pub timing: Timing,
}

impl Client {
    pub fn unix(broker: &Broker) -> Self {
        let stream = UnixStream::connect(broker.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: Stream::Unix(stream), slab: None, kept: Vec::new(), fds: Vec::new(), next: 1 }
    }

    pub fn tcp(broker: &Broker) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", broker.tcp)).unwrap();
        // As sidecars do: without it all but the first of several requests wait for the kernel's acknowledgement.
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: Stream::Tcp(stream), slab: None, kept: Vec::new(), fds: Vec::new(), next: 1 }
    }

    /// A greeted connection with a slab.
    pub fn greeted(broker: &Broker) -> Self {
        let mut client = Self::unix(broker);
        client.hello(Transport::Slab { request: Bytes::mib(4), response: Bytes::mib(4) });
        client
    }

    /// A greeted connection over TCP.
    pub fn inline(broker: &Broker) -> Self {
        let mut client = Self::tcp(broker);
        client.hello(Transport::Inline);
        client
    }

    fn hello(&mut self, transport: Transport) {
        self.say(&ToBroker::Hello { version: WIRE_VERSION, transport, agent: "test".to_owned() }, &[]);
        let FromBroker::Welcome { slab, .. } = self.hear() else { panic!("no welcome") };
        self.slab = slab.map(|layout| Slab::open(self.fds.pop().expect("a descriptor"), layout).unwrap());
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.write_all(bytes),
            Stream::Tcp(stream) => stream.write_all(bytes),
        }
    }

    pub fn say(&mut self, message: &ToBroker, payload: &[u8]) {
        let mut frame = Vec::new();
        wire::encode(message, u32::try_from(payload.len()).unwrap(), &mut frame).unwrap();
        frame.extend_from_slice(payload);
        self.send_bytes(&frame).unwrap();
    }

    pub fn say_with_fds(&self, message: &ToBroker, files: &[File]) {
        let Stream::Unix(stream) = &self.stream else { panic!("descriptors travel over Unix sockets") };
        let mut frame = Vec::new();
        wire::encode(message, 0, &mut frame).unwrap();
        let borrowed: Vec<_> = files.iter().map(File::as_fd).collect();
        assert_eq!(fds::send(stream, &frame, &borrowed).unwrap(), frame.len());
    }

    /// The next message, or `None` once the broker has closed the connection.
    pub fn try_hear(&mut self) -> Option<(FromBroker, Vec<u8>)> {
        loop {
            if let Some(head) = self.kept.first_chunk::<{ wire::HEAD_LEN }>() {
                let head = wire::Head::decode(*head).unwrap();
                let message_end = wire::HEAD_LEN + head.message_len as usize;
                let end = message_end + head.payload_len as usize;
                if self.kept.len() >= end {
                    let message = wire::decode(&self.kept[wire::HEAD_LEN..message_end]).unwrap();
                    let payload = self.kept[message_end..end].to_vec();
                    self.kept.drain(..end);
                    return Some((message, payload));
                }
            }
            let mut buffer = [0; 65536];
            let read = match &mut self.stream {
                Stream::Unix(stream) => fds::recv(&*stream, &mut buffer, &mut self.fds, 4),
                Stream::Tcp(stream) => stream.read(&mut buffer),
            };
            match read {
                Ok(0) => return None,
                Ok(read) => self.kept.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("nothing came in {PATIENCE:?}"),
                Err(_) => return None,
            }
        }
    }

    pub fn hear(&mut self) -> FromBroker {
        self.try_hear().expect("the connection is open").0
    }

    /// Waits until the broker has ended the connection, and returns the reason if it gave one.
    pub fn hear_the_end(&mut self) -> Option<Refusal> {
        let mut reason = None;
        while let Some((message, _)) = self.try_hear() {
            if let FromBroker::Closing { refusal } = message {
                reason = Some(refusal);
            }
        }
        reason
    }

    /// The connection still works.
    pub fn is_served(&mut self) -> bool {
        self.say(&ToBroker::Ping { nonce: 7 }, &[]);
        loop {
            match self.try_hear() {
                Some((FromBroker::Pong { nonce: 7 }, _)) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Registers, uploading where that is asked for.
    pub fn register(
        &mut self,
        spec: &FunctionSpec,
        files: &[(&str, &Path)],
    ) -> Result<(FunctionId, Signature), Refusal> {
        for _ in 0..2 {
            let call = CallId(u32::try_from(self.id()).unwrap());
            self.say(&ToBroker::Register { call, function: spec.clone() }, &[]);
            match self.outcome() {
                FromBroker::Registered { function, signature, .. } => return Ok((function, signature)),
                FromBroker::CallRefused { refusal, .. } => return Err(refusal),
                FromBroker::ModelNeeded { .. } => self.upload(spec.model, files)?,
                other => panic!("{other:?}"),
            }
        }
        panic!("the model is asked for again and again");
    }

    fn outcome(&mut self) -> FromBroker {
        loop {
            match self.hear() {
                FromBroker::Preparing { .. } => {}
                other => return other,
            }
        }
    }

    pub fn upload(&mut self, model: ModelDigest, files: &[(&str, &Path)]) -> Result<(), Refusal> {
        let call = CallId(u32::try_from(self.id()).unwrap());
        let describe = |(name, path): &(&str, &Path)| ModelFile {
            path: (*name).to_owned(),
            len: Bytes::new(fs::metadata(path).unwrap().len()),
        };
        let upload = ToBroker::Upload { call, model, files: files.iter().map(describe).collect() };
        match self.stream {
            Stream::Unix(_) => {
                let open: Vec<_> = files.iter().map(|(_, path)| File::open(path).unwrap()).collect();
                self.say_with_fds(&upload, &open);
            }
            Stream::Tcp(_) => {
                self.say(&upload, &[]);
                for (_, path) in files {
                    for part in fs::read(path).unwrap().chunks(1 << 16) {
                        self.say(&ToBroker::UploadPart { call }, part);
                    }
                }
            }
        }
        match self.outcome() {
            FromBroker::Uploaded { .. } => Ok(()),
            FromBroker::CallRefused { refusal, .. } => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// Registers a model of one file under this name.
    pub fn register_file(&mut self, name: &str, file: &Path) -> Result<FunctionId, Refusal> {
        let spec = spec(name, digest(file));
        self.register(&spec, &[("model.onnx", file)]).map(|(function, _)| function)
    }

    /// Sends one input of any type, at this offset of the slab, or inline.
    pub fn ask_bytes(
        &mut self,
        function: FunctionId,
        (dtype, shape): (DType, &[u64]),
        bytes: &[u8],
        offset: u64,
    ) -> RequestId {
        let request = RequestId(self.id());
        let len = bytes.len() as u64;
        let span = Span { offset: if self.slab.is_some() { offset } else { 0 }, len };
        if let Some(slab) = &self.slab {
            slab.request_region(span).unwrap().write(0, bytes).unwrap();
        }
        let payload = if self.slab.is_some() { &[][..] } else { bytes };
        let input = TensorSlice { index: 0, dtype, shape: Shape::new(shape).unwrap(), span };
        self.say(
            &ToBroker::Infer { request, function, inputs: vec![input], outputs: vec![], time_left: None },
            payload,
        );
        request
    }

    /// Sends one f32 input at offset 0 of the slab, or inline.
    pub fn ask(&mut self, function: FunctionId, shape: &[u64], values: &[f32]) -> RequestId {
        self.ask_in(function, shape, values, None)
    }

    pub fn ask_in(
        &mut self,
        function: FunctionId,
        shape: &[u64],
        values: &[f32],
        time_left: Option<Duration>,
    ) -> RequestId {
        let request = RequestId(self.id());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let span = Span { offset: 0, len: bytes.len() as u64 };
        if let Some(slab) = &self.slab {
            slab.request_region(span).unwrap().write(0, &bytes).unwrap();
        }
        let payload = if self.slab.is_some() { &[][..] } else { &bytes };
        let input = TensorSlice { index: 0, dtype: DType::F32, shape: Shape::new(shape).unwrap(), span };
        self.say(&ToBroker::Infer { request, function, inputs: vec![input], outputs: vec![], time_left }, payload);
        request
    }

    /// The next answer or refusal, of whichever request. Outputs are released.
    pub fn answer(&mut self) -> (RequestId, Result<Answer, Refusal>) {
        loop {
            match self.try_hear().expect("the connection is open") {
                (FromBroker::Answer { request, outputs, timing }, payload) => {
                    let outputs = outputs.into_iter().map(|slice| {
                        let bytes = self.bytes(&slice, &payload);
                        (slice, bytes)
                    });
                    let outputs = outputs.collect();
                    self.say(&ToBroker::Release { request }, &[]);
                    return (request, Ok(Answer { outputs, timing }));
                }
                (FromBroker::Refused { request, refusal }, _) => return (request, Err(refusal)),
                (FromBroker::Preparing { .. } | FromBroker::Draining, _) => {}
                (other, _) => panic!("{other:?}"),
            }
        }
    }

    fn bytes(&self, slice: &TensorSlice, payload: &[u8]) -> Vec<u8> {
        match &self.slab {
            Some(slab) => {
                let mut bytes = vec![0; usize::try_from(slice.span.len).unwrap()];
                slab.response_region(slice.span).unwrap().read(0, &mut bytes).unwrap();
                bytes
            }
            None => {
                let start = usize::try_from(slice.span.offset).unwrap();
                payload[start..start + usize::try_from(slice.span.len).unwrap()].to_vec()
            }
        }
    }
}

impl Answer {
    pub fn floats(&self) -> Vec<f32> {
        self.outputs[0].1.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}
