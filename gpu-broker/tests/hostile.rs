//! What a hostile peer or model gets: cut off or refused, with nobody else noticing.

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::wildcard_enum_match_arm,
    clippy::type_complexity,
    clippy::needless_pass_by_value,
    reason = "tests"
)]

mod common;

use std::{
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::Duration,
};

use common::{Broker, Client, client::Stream, digest, model::Linear, spec, wait_for};
use faaswap_protocol::{
    Bytes, CallId, DType, FromBroker, FunctionId, ModelDigest, ModelFile, Refusal, RequestId, Shape, Span, TensorSlice,
    ToBroker, Transport, limits::WIRE_VERSION, wire,
};
use prost::Message;

const DEVICE: &str = "[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"";

/// A broker, and a peer that must not notice what others do.
struct Scene {
    broker: Broker,
    victim: Client,
    function: FunctionId,
    model: Linear,
}

impl Scene {
    fn new() -> Self {
        let broker = Broker::start(DEVICE);
        let model = Linear { size: 64, seed: 1 };
        let mut victim = Client::greeted(&broker);
        let function = victim.register_file("victim", &model.write(broker.dir.path())).unwrap();
        Self { broker, victim, function, model }
    }

    fn victim_is_served(&mut self) {
        let input = self.model.input(5);
        self.victim.ask(self.function, &[1, 64], &input);
        assert_eq!(self.victim.answer().1.unwrap().floats(), self.model.expected(&input));
        assert!(self.broker.is_alive());
    }
}

fn is_violation(reason: Option<Refusal>) -> bool {
    matches!(reason, Some(Refusal::ProtocolViolation { .. }))
}

/// A generator that needs no crate: xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn random_bytes_end_only_the_connection_that_sends_them() {
    let mut scene = Scene::new();
    let mut random = Random(0x5eed);
    for round in 0..300 {
        let bytes: Vec<u8> = (0..1 + random.next() % 400).map(|_| random.next().to_le_bytes()[0]).collect();
        // Half of them come after a good hello.
        let mut client = if round % 2 == 0 { Client::unix(&scene.broker) } else { Client::greeted(&scene.broker) };
        // The broker may close before all is written.
        let _ = client.send_bytes(&bytes);
        drop(client);
    }
    scene.victim_is_served();
}

#[test]
fn good_frames_with_one_byte_changed_never_harm_the_broker() {
    let mut scene = Scene::new();
    let input = TensorSlice {
        index: 0,
        dtype: DType::F32,
        shape: Shape::new([1, 64]).unwrap(),
        span: Span { offset: 0, len: 256 },
    };
    let infer = |request| ToBroker::Infer {
        request: RequestId(request),
        function: FunctionId(1),
        inputs: vec![input.clone()],
        outputs: vec![0],
        time_left: None,
    };
    let mut random = Random(0xfeed);
    let file = scene.model.write(scene.broker.dir.path());
    for _ in 0..20 {
        let mut client = Client::greeted(&scene.broker);
        client.register_file("fuzzed", &file).unwrap();
        for round in 0..20 {
            let mut frame = Vec::new();
            wire::encode(&infer(round), 0, &mut frame).unwrap();
            let at = usize::try_from(random.next()).unwrap() % frame.len();
            frame[at] ^= 1 << (random.next() % 8);
            if client.send_bytes(&frame).is_err() {
                break;
            }
        }
        drop(client);
    }
    scene.victim_is_served();
}

#[test]
fn lengths_beyond_the_limits_are_refused_before_anything_comes() {
    let mut scene = Scene::new();
    for head in [[0xff_u8; 8], [0; 8], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]] {
        let mut client = Client::greeted(&scene.broker);
        client.send_bytes(&head).unwrap();
        assert!(is_violation(client.hear_the_end()), "{head:?}");
    }
    scene.victim_is_served();
}

#[test]
fn places_outside_of_the_slab_end_the_connection() {
    let mut scene = Scene::new();
    let file = scene.model.write(scene.broker.dir.path());
    // In the response half; unaligned; past the end; wrapping around.
    for offset in [4 << 20, 3, 8 << 20, u64::MAX - 63, (4 << 20) - 64] {
        let mut client = Client::greeted(&scene.broker);
        let function = client.register_file("outside", &file).unwrap();
        let span = Span { offset, len: 256 };
        let input = TensorSlice { index: 0, dtype: DType::F32, shape: Shape::new([1, 64]).unwrap(), span };
        let request = RequestId(1);
        client.say(&ToBroker::Infer { request, function, inputs: vec![input], outputs: vec![], time_left: None }, &[]);
        assert!(is_violation(client.hear_the_end()), "{offset}");
    }
    scene.victim_is_served();
}

#[test]
fn what_the_protocol_forbids_ends_the_connection_with_the_reason() {
    let mut scene = Scene::new();
    let hello = |version| ToBroker::Hello { version, transport: Transport::Inline, agent: String::new() };
    type Misdeed = Box<dyn Fn(&mut Client)>;
    let misdeeds: Vec<(&str, Misdeed)> = vec![
        ("a second hello", Box::new(move |c| c.say(&hello(WIRE_VERSION), &[]))),
        ("payload where there is none", Box::new(|c| c.say(&ToBroker::Ping { nonce: 1 }, b"extra"))),
        (
            "the same request twice",
            Box::new(|c| {
                let file = c.slab.as_ref().map(|_| ()).map(|()| FunctionId(1)).unwrap();
                let ask = ToBroker::Infer {
                    request: RequestId(5),
                    function: file,
                    inputs: vec![TensorSlice {
                        index: 0,
                        dtype: DType::F32,
                        shape: Shape::new([512, 64]).unwrap(),
                        span: Span { offset: 0, len: 512 * 256 },
                    }],
                    outputs: vec![],
                    time_left: None,
                };
                c.say(&ask, &[]);
                c.say(&ask, &[]);
            }),
        ),
        (
            "descriptors without an upload",
            Box::new(|c| {
                c.say_with_fds(&ToBroker::Ping { nonce: 1 }, &[File::open("/dev/null").unwrap()]);
            }),
        ),
    ];
    for (what, misdeed) in misdeeds {
        let mut client = Client::greeted(&scene.broker);
        client.register_file("bad", &scene.model.write(scene.broker.dir.path())).unwrap();
        misdeed(&mut client);
        assert!(is_violation(client.hear_the_end()), "{what}");
    }
    let mut old = Client::unix(&scene.broker);
    old.say(&hello(WIRE_VERSION + 1), &[]);
    let reason = old.hear_the_end().unwrap().to_string();
    assert!(reason.contains("version"), "{reason}");
    scene.victim_is_served();
}

#[test]
fn the_slab_cannot_be_shrunk_under_the_broker() {
    let broker = Broker::start(DEVICE);
    let mut client = Client::unix(&broker);
    let transport = Transport::Slab { request: Bytes::mib(1), response: Bytes::mib(1) };
    client.say(&ToBroker::Hello { version: WIRE_VERSION, transport, agent: String::new() }, &[]);
    let Stream::Unix(stream) = &client.stream else { panic!() };
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut buffer = [0; 256];
    while fds.is_empty() {
        assert_ne!(faaswap_slab::fds::recv(stream, &mut buffer, &mut fds, 1).unwrap(), 0);
    }
    let error = File::from(fds.remove(0)).set_len(0).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn ten_thousand_half_open_connections_push_out_each_other_and_nobody_else() {
    let mut scene = Scene::new();
    let wave = 500;
    for _ in 0..20 {
        let strangers: Vec<_> = (0..wave).map(|_| Client::unix(&scene.broker)).collect();
        scene.victim_is_served();
        drop(strangers);
    }
    let strangers: Vec<_> = (0..wave).map(|_| Client::unix(&scene.broker)).collect();
    assert!(Client::greeted(&scene.broker).is_served(), "a newcomer finds a place");
    scene.victim_is_served();
    drop(strangers);
}

#[test]
fn more_that_come_at_once_than_may_be_strangers_all_say_hello() {
    let scene = Scene::new();
    let hello = ToBroker::Hello { version: WIRE_VERSION, transport: Transport::Inline, agent: String::new() };
    // All connect before the first of them says a word, as the sidecars of a node do once its broker has started anew. If
    // this thread is held up meanwhile, another try.
    let mut frame = Vec::new();
    wire::encode(&hello, 0, &mut frame).unwrap();
    let all_served = (0..10).any(|_| {
        let mut all: Vec<_> = (0..400).map(|_| Client::unix(&scene.broker)).collect();
        thread::sleep(Duration::from_millis(20));
        // Those that were cut off cannot be written to.
        all.iter_mut().for_each(|one| drop(one.send_bytes(&frame)));
        let is_welcome = |one: &mut Client| matches!(one.try_hear(), Some((FromBroker::Welcome { .. }, _)));
        all.iter_mut().all(is_welcome)
    });
    assert!(all_served);
}

#[test]
fn a_stalled_reader_is_cut_off() {
    let mut scene = Scene::new();
    let file = scene.model.write(scene.broker.dir.path());
    let mut stalled = Client::inline(&scene.broker);
    let function = stalled.register_file("stalled", &file).unwrap();
    let rows = 4096;
    let input: Vec<f32> = (0..rows).flat_map(|_| scene.model.input(0)).collect();
    // 24 MiB of answers, of which the kernel takes a few; none is read.
    for _ in 0..24 {
        stalled.ask(function, &[rows, 64], &input);
    }
    wait_for("the stalled reader to be cut off", || scene.broker.metric("faaswap_peers_cut_off_total") >= 1.0);
    wait_for("its function to be gone", || scene.broker.get("/v1/functions").as_array().unwrap().len() == 1);
    scene.victim_is_served();
}

fn register_bytes(scene: &Scene, name: &str, bytes: &[u8]) -> Result<FunctionId, Refusal> {
    let path = scene.broker.dir.path().join(format!("{name}.onnx"));
    fs::write(&path, bytes).unwrap();
    Client::greeted(&scene.broker).register_file(name, &path)
}

#[test]
fn hostile_models_are_refused_with_the_reason() {
    let mut scene = Scene::new();
    let good = Linear { size: 64, seed: 9 };
    let bytes = good.proto().encode_to_vec();
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("garbage", b"this is no model at all".to_vec()),
        ("truncated", bytes[..bytes.len() / 2].to_vec()),
    ];
    let mut changed = |name, change: &dyn Fn(&mut faaswap_engine::onnx::GraphProto)| {
        let mut proto = good.proto();
        change(proto.graph.as_mut().unwrap());
        cases.push((name, proto.encode_to_vec()));
    };
    changed("cyclic", &|graph| graph.node[0].input[0] = "y".to_owned());
    changed("huge-dims", &|graph| graph.initializer[0].dims = vec![1 << 40, 1 << 40]);
    changed("unknown-operator", &|graph| graph.node[0].op_type = Some("Explode".to_owned()));
    for location in ["missing.bin", "../../../../etc/passwd", "/etc/passwd"] {
        let name: String = location.chars().filter(char::is_ascii_alphanumeric).collect();
        let name: &'static str = Box::leak(name.into_boxed_str());
        changed(name, &|graph| {
            let weight = &mut graph.initializer[0];
            weight.raw_data = None;
            weight.data_location = Some(faaswap_engine::onnx::tensor_proto::DataLocation::External.into());
            let entry = |key: &str, value: &str| faaswap_engine::onnx::StringStringEntryProto {
                key: Some(key.to_owned()),
                value: Some(value.to_owned()),
            };
            weight.external_data = vec![entry("location", location)];
        });
    }
    for (name, bytes) in cases {
        let refusal = register_bytes(&scene, name, &bytes).expect_err(name);
        assert!(matches!(refusal, Refusal::ModelRejected { .. }), "{name}: {refusal:?}");
        let again = register_bytes(&scene, name, &bytes).expect_err(name);
        assert_eq!(again, refusal, "{name} is remembered");
    }
    let large = Linear { size: 600, seed: 1 }.proto().encode_to_vec();
    let refusal = register_bytes(&scene, "large", &large).unwrap_err();
    let expected = Refusal::ModelTooLarge { needed: Bytes::new(600 * 600 * 4), capacity: Bytes::mib(1) };
    assert_eq!(refusal, expected);
    scene.victim_is_served();
}

#[test]
fn uploads_that_are_not_what_they_say_are_refused() {
    let mut scene = Scene::new();
    let file = Linear { size: 64, seed: 2 }.write(scene.broker.dir.path());
    let mut client = Client::greeted(&scene.broker);
    let wrong = ModelDigest([7; 32]);
    assert!(matches!(client.upload(wrong, &[("m.onnx", &file)]), Err(Refusal::UploadFailed { .. })));
    assert!(matches!(client.upload(digest(&file), &[("../m.onnx", &file)]), Err(Refusal::UploadFailed { .. })));
    assert!(matches!(client.upload(wrong, &[("null", Path::new("/dev/null"))]), Err(Refusal::UploadFailed { .. })));
    let files = vec![ModelFile { path: "m.onnx".to_owned(), len: Bytes::new(10) }];
    client.say(&ToBroker::Upload { call: CallId(77), model: wrong, files }, &[]);
    let heard = client.hear();
    assert!(
        matches!(&heard, FromBroker::CallRefused { call: CallId(77), refusal: Refusal::UploadFailed { .. } }),
        "{heard:?}"
    );
    assert!(client.is_served(), "a refused upload does not end the connection");
    scene.victim_is_served();
}

#[test]
fn what_a_function_may_not_be_is_refused() {
    let scene = Scene::new();
    let file = scene.model.write(scene.broker.dir.path());
    let mut client = Client::greeted(&scene.broker);
    let mut zero = spec("zero", digest(&file));
    zero.slo.deadline = Duration::ZERO;
    let mut percentile = spec("percentile", digest(&file));
    percentile.slo.percentile = 10_000;
    for bad in [zero, percentile] {
        assert!(matches!(client.register(&bad, &[]), Err(Refusal::FunctionInvalid { .. })));
    }
    // The victim's name belongs to a user of this machine; a peer over TCP is none.
    let mut remote = Client::inline(&scene.broker);
    assert_eq!(remote.register(&spec("victim", digest(&file)), &[]), Err(Refusal::NameTaken));
}

#[test]
fn a_client_that_sends_nothing_more_in_the_middle_of_a_frame_harms_nobody() {
    let mut scene = Scene::new();
    let mut client = Client::greeted(&scene.broker);
    client.send_bytes(&[100, 0, 0, 0]).unwrap();
    scene.victim_is_served();
    if let Stream::Unix(stream) = &mut client.stream {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
    }
}
