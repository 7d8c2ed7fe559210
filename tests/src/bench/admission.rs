//! What the injector takes for a review, as API servers ask it: over TLS, the real program, reviews of five platforms.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::ServerName};
use serde_json::Value;

use super::{Figures, p50, p98, title};
use crate::{
    Result, Trouble, cache,
    http::Client,
    ports::free_port,
    process::{Process, temporary_folder},
};

/// Reviews that count, on one connection, as API servers keep one.
const REVIEWS: usize = 1000;
/// Reviews before them that do not.
const WARM_UP: usize = 50;
/// Reviews on a connection of their own.
const ALONE: usize = 200;
/// Reviews and what becomes of the pods; the injector's own tests keep them.
const GOLDEN: &str = "sidecar/injector/tests/golden";
const PLATFORMS: [&str; 5] = ["openfaas", "knative", "deployment", "kserve", "fetched"];
const HOST: &str = "faaswap-injector.faaswap-system.svc";
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest head of a reply.
const HEAD_BYTES_MAX: usize = 16 << 10;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A question, and the pod that its answer makes.
struct Case {
    request: Vec<u8>,
    pod: Value,
    expected: Value,
}

fn case(platform: &str) -> Result<Case> {
    let read = |kind: &str| {
        let path = cache::root().join(GOLDEN).join(format!("{platform}.{kind}.json"));
        fs::read(&path).map_err(Trouble::while_doing(path.display()))
    };
    let review: Value = serde_json::from_slice(&read("review")?)?;
    let body = review.to_string();
    let head = format!(
        "POST /mutate HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let pod = review["request"]["object"].clone();
    Ok(Case { request: (head + &body).into_bytes(), pod, expected: serde_json::from_slice(&read("pod")?)? })
}

impl Case {
    fn is_answered_by(&self, body: &[u8]) -> bool {
        let patched = || {
            let answer: Value = serde_json::from_slice(body).ok()?;
            let patch = STANDARD.decode(answer["response"]["patch"].as_str()?).ok()?;
            let mut pod = self.pod.clone();
            json_patch::patch(&mut pod, &serde_json::from_slice::<json_patch::Patch>(&patch).ok()?).ok()?;
            Some(pod)
        };
        patched().is_some_and(|pod| pod == self.expected)
    }
}

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title(&format!("admission: reviews over TLS, pods of {} platforms", PLATFORMS.len()));
    let folder = temporary_folder(&std::env::temp_dir())?;
    let key = rcgen::generate_simple_self_signed([HOST.to_owned()]).map_err(|e| Trouble::new(e.to_string()))?;
    fs::write(folder.path().join("tls.crt"), key.cert.pem())?;
    fs::write(folder.path().join("tls.key"), key.signing_key.serialize_pem())?;
    let (address, pages) = (free_port()?, free_port()?);
    let mut injector = Process::start("injector", &cache::program("faaswap-injector")?, folder.path(), |command| {
        command
            .env("INJECTOR_LISTEN", address.to_string())
            .env("INJECTOR_METRICS_LISTEN", pages.to_string())
            .env("INJECTOR_TLS_DIR", folder.path());
    })?;
    injector.wait_for("the injector to be ready", PATIENCE, || {
        Client::new(pages, PATIENCE).get("/readyz").ok().filter(|reply| reply.status == 200)
    })?;
    let mut roots = RootCertStore::empty();
    roots.add(key.cert.der().clone()).map_err(|e| Trouble::new(e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|e| Trouble::new(e.to_string()))?.with_root_certificates(roots).with_no_client_auth();
    let config = Arc::new(config);
    let cases: Vec<Case> = PLATFORMS.iter().map(|platform| case(platform)).collect::<Result<_>>()?;

    let (mut kept, mut alone) = (Vec::new(), Vec::new());
    let mut stream = connect(&config, address)?;
    for (at, case) in (0..WARM_UP + REVIEWS).zip(cases.iter().cycle()) {
        let start = Instant::now();
        let body = ask(&mut stream, &case.request)?;
        if at >= WARM_UP {
            kept.push(start.elapsed());
        }
        figures.check(case.is_answered_by(&body));
    }
    for case in cases.iter().cycle().take(ALONE) {
        let start = Instant::now();
        let body = ask(&mut connect(&config, address)?, &case.request)?;
        alone.push(start.elapsed());
        figures.check(case.is_answered_by(&body));
    }
    for (name, times) in [("kept", &mut kept), ("new", &mut alone)] {
        let (at50, at98, count) = (p50(times), p98(times), times.len());
        println!("  {count:4} reviews, {name:4} connection: p50 {at50:.3} ms, p98 {at98:.3} ms");
        figures.set(&format!("admission_{name}_p98_ms"), at98);
    }
    Ok(())
}

fn connect(config: &Arc<ClientConfig>, address: SocketAddr) -> Result<Tls> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let name = ServerName::try_from(HOST).map_err(|e| Trouble::new(e.to_string()))?;
    let connection = ClientConnection::new(Arc::clone(config), name).map_err(|e| Trouble::new(e.to_string()))?;
    Ok(StreamOwned::new(connection, stream))
}

/// Sends a request and reads its answer's body.
fn ask(stream: &mut Tls, request: &[u8]) -> Result<Vec<u8>> {
    stream.write_all(request)?;
    let mut bytes = Vec::new();
    let mut piece = [0; 16 << 10];
    loop {
        if let Some(whole) = body(&bytes)? {
            return Ok(whole);
        }
        match stream.read(&mut piece)? {
            0 => return Err(Trouble::new("the injector closed the connection")),
            read => bytes.extend_from_slice(&piece[..read]),
        }
    }
}

/// The body, once all of it has come.
fn body(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        let is_long = bytes.len() > HEAD_BYTES_MAX;
        return if is_long { Err(Trouble::new("the answer's head is too long")) } else { Ok(None) };
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    if !head.starts_with("http/1.1 200") {
        return Err(Trouble::new(format!("the injector answered: {head}")));
    }
    let len = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let len: usize = len.ok_or_else(|| Trouble::new("the answer does not tell its length"))?.trim().parse()?;
    Ok(bytes.get(end + 4..end + 4 + len).map(<[u8]>::to_vec))
}
