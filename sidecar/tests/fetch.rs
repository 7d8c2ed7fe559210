//! Models on servers: what comes over connections that break, servers that change their files, lie or hang; and that
//! nothing is fetched that the node has.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{io::Read, process::Stdio, sync::Arc, time::Duration};

use faaswap_protocol::{Bytes, ModelDigest};
use faaswap_sidecar::{
    broker::{Broker, BrokerConfig, FunctionState},
    fetch::{self, Credentials, FetchError, FetchLimits, ModelUrl, Progress, Remote, Stage},
    model::{LocalFile, ModelSource},
};
use sha2::{Digest, Sha256};
use support::{
    broker::{FakeBroker, doubler},
    clients::Http,
    files::{Answer, Files},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

/// Begins as ONNX files do, and is larger than one read.
fn model(seed: u8) -> Vec<u8> {
    let bytes = (0..300_000_u32).map(|at| at.to_le_bytes()[0] ^ seed);
    [8].into_iter().chain(bytes).collect()
}

fn digest(bytes: &[u8]) -> ModelDigest {
    ModelDigest(Sha256::digest(bytes).into())
}

/// Fails soon rather than patiently.
fn limits() -> FetchLimits {
    let ms = Duration::from_millis;
    FetchLimits { pause_min: ms(1), pause_max: ms(2), again_min: ms(1), again_max: ms(2), ..FetchLimits::default() }
}

fn remote(url: &str, digest: Option<ModelDigest>) -> Remote {
    Remote {
        graph: ModelUrl::parse(url).unwrap().0,
        data: Vec::new(),
        digest,
        credentials: Credentials::None,
        folder: std::env::temp_dir(),
        limits: limits(),
    }
}

async fn fetched(remote: &Remote) -> Result<(ModelDigest, Vec<LocalFile>), FetchError> {
    fetch::fetch(remote, &Progress::default()).await
}

fn content(file: &LocalFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.open().unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_broke() {
    let file = model(1);
    let served = file.clone();
    let files = Files::start(move |before, asked| match before {
        0 => Answer::whole("\"v1\"", &served).cut(100_000),
        1 => Answer::status("503 Service Unavailable"),
        2 => Answer::rest("\"v1\"", &served, start(asked)).cut(50_000),
        _ => Answer::rest("\"v1\"", &served, start(asked)),
    })
    .await;
    let (came, local) = fetched(&remote(&files.url("/m.onnx"), Some(digest(&file)))).await.unwrap();
    assert_eq!((came, content(&local[0]) == file), (digest(&file), true));
    let ranges: Vec<_> = files.asked().iter().map(|asked| asked.header("range").to_owned()).collect();
    assert_eq!(ranges, ["", "bytes=200001-", "bytes=200001-", "bytes=250001-"]);
    assert_eq!(files.asked()[1].header("if-range"), "\"v1\"");
    assert_eq!(content(&local[0]).len(), file.len(), "it can be read again, from its beginning");
}

fn start(asked: &support::files::Asked) -> usize {
    asked.header("range").trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap()
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_is_never_put_together_from_two() {
    let (old, new) = (model(1), model(2));
    // One that knows If-Range sends the whole new file; one that does not, the rest of it; a third another part.
    for second in 0..3 {
        let (first, served) = (old.clone(), new.clone());
        let files = Files::start(move |before, asked| match (before, second) {
            (0, _) => Answer::whole("\"old\"", &first).cut(100_000),
            (1, 1) => Answer::rest("\"new\"", &served, start(asked)),
            (1, 2) => Answer::rest("\"old\"", &first, 7),
            _ => Answer::whole("\"new\"", &served),
        })
        .await;
        let (came, local) = fetched(&remote(&files.url("/m.onnx"), Some(digest(&new)))).await.unwrap();
        assert_eq!((came, content(&local[0]) == new), (digest(&new), true), "{second}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_resume_is_asked_for_the_whole_again() {
    let file = model(1);
    let served = file.clone();
    // No tag and no date: nothing says that the rest would be of the same file.
    let whole = move |_: usize| Answer::new("200 OK", &[format!("Content-Length: {}", served.len())], &served);
    let files = Files::start(move |before, _| if before == 0 { whole(0).cut(9) } else { whole(1) }).await;
    let (_, local) = fetched(&remote(&files.url("/m.onnx"), Some(digest(&file)))).await.unwrap();
    assert_eq!(content(&local[0]).len(), file.len());
    assert_eq!(files.asked()[1].header("range"), "");
}

#[tokio::test]
async fn what_cannot_be_the_model_is_refused_with_the_reason() {
    let file = model(1);
    let cases: [(&str, Answer, &str, usize); 9] = [
        ("another", Answer::whole("\"1\"", &model(9)), "was wanted", 1),
        ("missing", Answer::status("404 Not Found"), "there is no such file", 1),
        ("locked", Answer::status("403 Forbidden"), "model_auth_file", 1),
        ("page", Answer::whole("\"1\"", b"<!DOCTYPE html>"), "no ONNX file, it begins with '<!DOCTYPE html>'", 1),
        ("packed", Answer::new("200 OK", &["Content-Encoding: gzip".into()], b"\x08"), "packed", 1),
        ("down", Answer::status("500 Oops"), "500", 3),
        ("cut", Answer::whole("\"1\"", &file).cut(300_001), "m.onnx: ", 3),
        ("silent", Answer::whole("\"1\"", &file).cut(1000).hanging(), "silent for", 3),
        ("mute", Answer::status("200 OK").cut(19).hanging(), "no answer within", 3),
    ];
    for (name, answer, said, tries) in cases {
        let files = Files::start(move |_, _| answer.clone()).await;
        let mut remote = remote(&files.url("/m.onnx?sig=s3cret"), Some(digest(&file)));
        let soon = Duration::from_millis(100);
        remote.limits = FetchLimits { tries_max: 3, silence_max: soon, head_within: soon, ..limits() };
        let error = fetched(&remote).await.unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("/m.onnx") && !error.contains("s3cret"), "{name}: {error}");
        assert_eq!(files.asked().len(), tries, "{name}: {error}");
    }
}

#[tokio::test]
async fn more_than_a_model_may_have_is_not_taken_whatever_the_server_says() {
    let file = model(1);
    let chunked = [format!("{:x}\r\n", file.len()).into_bytes(), file.clone(), b"\r\n0\r\n\r\n".to_vec()].concat();
    let answers = [
        Answer::whole("\"1\"", &file),
        Answer::new("200 OK", &["Transfer-Encoding: chunked".into()], &chunked),
        Answer::new("200 OK", &["Connection: close".into()], &file),
    ];
    for answer in answers {
        let files = Files::start(move |_, _| answer.clone()).await;
        let mut small = remote(&files.url("/m.onnx"), Some(digest(&file)));
        small.limits.bytes_max = Bytes::new(200_000);
        let error = fetched(&small).await.unwrap_err();
        assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
        small.limits.bytes_max = Bytes::of_len(file.len());
        assert_eq!(fetched(&small).await.unwrap().0, digest(&file), "as much as may be is not too much");
    }
}

#[tokio::test]
async fn without_length_and_digest_nobody_knows_whether_it_is_whole() {
    let file = model(1);
    let files = Files::start(move |_, _| Answer::new("200 OK", &["Connection: close".into()], &file)).await;
    let error = fetched(&remote(&files.url("/m.onnx"), None)).await.unwrap_err().to_string();
    assert!(error.contains("pin it"), "{error}");
}

#[tokio::test]
async fn a_disk_that_takes_nothing_is_said() {
    let file = model(1);
    let files = Files::start(move |_, _| Answer::whole("\"1\"", &file)).await;
    let folder = "/proc/no-such-folder".into();
    let nowhere = Remote { folder, ..remote(&files.url("/m.onnx"), None) };
    let error = fetched(&nowhere).await.unwrap_err().to_string();
    assert!(error.contains("/proc/no-such-folder") && error.contains("model_dir"), "{error}");
}

#[tokio::test]
async fn redirects_are_followed_within_reason_and_credentials_stay_at_home() {
    let file = model(1);
    let served = file.clone();
    let elsewhere = Files::start(move |_, _| Answer::whole("\"1\"", &served)).await;
    let away = elsewhere.url("/real?sig=1");
    let files = Files::start(move |_, asked| match asked.path.as_str() {
        "/m.onnx" => Answer::redirect("next"),
        "/next" => Answer::redirect(&away),
        "/loop" => Answer::redirect("/loop"),
        _ => Answer::redirect("file:///etc/passwd"),
    })
    .await;
    let mut here = remote(&files.url("/m.onnx"), Some(digest(&file)));
    here.credentials = Credentials::Given("Bearer s3cret".into());
    assert_eq!(fetched(&here).await.unwrap().0, digest(&file));
    let told: Vec<_> = files.asked().iter().map(|asked| asked.header("authorization").to_owned()).collect();
    assert_eq!(told, ["Bearer s3cret", "Bearer s3cret"]);
    assert_eq!((elsewhere.asked()[0].path.as_str(), elsewhere.asked()[0].header("authorization")), ("/real?sig=1", ""));
    for (path, said) in [("/loop", "goes on and on"), ("/file", "no URL")] {
        let error = fetched(&remote(&files.url(path), Some(digest(&file)))).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[tokio::test]
async fn credentials_are_read_anew_for_each_fetch() {
    let file = model(1);
    let served = file.clone();
    let files = Files::start(move |_, _| Answer::whole("\"1\"", &served)).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("auth");
    let mut remote = remote(&files.url("/m.onnx"), Some(digest(&file)));
    remote.credentials = Credentials::File(path.clone());
    let error = fetched(&remote).await.unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    for token in ["Basic one\n", "Basic two"] {
        std::fs::write(&path, token).unwrap();
        fetched(&remote).await.unwrap();
    }
    let told: Vec<_> = files.asked().iter().map(|asked| asked.header("authorization").to_owned()).collect();
    assert_eq!(told, ["Basic one", "Basic two"]);
}

#[tokio::test]
async fn a_model_of_several_files_has_one_digest() {
    let (graph, weights) = (model(1), b"weights".to_vec());
    let listed = format!("{}  m.onnx\n{}  w.bin\n", digest(&graph).hex(), digest(&weights).hex());
    let served = (graph.clone(), weights.clone());
    let files = Files::start(move |_, asked| match asked.path.as_str() {
        "/a/m.onnx" => Answer::whole("\"1\"", &served.0),
        "/a/w.bin" => Answer::whole("\"1\"", &served.1),
        _ => Answer::status("404 Not Found"),
    })
    .await;
    let url = ModelUrl::parse(&files.url("/a/w.bin")).unwrap().0;
    let mut several = remote(&files.url("/a/m.onnx"), Some(digest(listed.as_bytes())));
    several.data = vec![("w.bin".into(), url)];
    let (_, local) = fetched(&several).await.unwrap();
    assert_eq!((content(&local[0]) == graph, content(&local[1])), (true, weights));
    several.limits.bytes_max = Bytes::of_len(graph.len() + 3);
    assert!(matches!(fetched(&several).await, Err(FetchError::TooLarge { .. })), "the limit is for all files");
}

#[tokio::test]
async fn a_fetch_that_failed_is_tried_again_and_says_why_meanwhile() {
    let file = model(1);
    let served = file.clone();
    let files = Files::start(move |before, _| match before {
        0 => Answer::status("404 Not Found"),
        _ => Answer::whole("\"1\"", &served),
    })
    .await;
    let mut stages = Vec::new();
    let told = |stage| {
        stages.push(match stage {
            Stage::Fetching(_) => "fetching".to_owned(),
            Stage::Failed(why) => why,
        });
    };
    let (came, _) = fetch::until_fetched(&remote(&files.url("/m.onnx"), Some(digest(&file))), told).await;
    assert_eq!((came, stages.len()), (digest(&file), 3));
    assert!(stages[1].contains("404"), "{stages:?}");
}

fn client(broker: &FakeBroker, remote: &Remote) -> Broker {
    let model = ModelSource { remote: Some(Arc::new(remote.clone())), ..ModelSource::known(remote.digest.unwrap()) };
    let mut config = support::config(broker.target(), Duration::from_secs(10));
    config.function.model = model.digest;
    Broker::start(BrokerConfig { model, ..config })
}

#[tokio::test]
async fn only_a_node_without_the_weights_has_them_fetched_and_sent() {
    for broker in [FakeBroker::start(doubler()), FakeBroker::start_tcp(doubler()).await] {
        let file = model(1);
        let served = file.clone();
        let files = Files::start(move |_, _| Answer::whole("\"1\"", &served)).await;
        let there = remote(&files.url("/m.onnx"), Some(digest(&file)));
        let first = client(&broker, &there);
        first.until_ready().await.unwrap();
        assert_eq!((broker.seen().uploads, files.asked().len()), (1, 1));
        let second = client(&broker, &there);
        second.until_ready().await.unwrap();
        assert_eq!((broker.seen().uploads, files.asked().len()), (1, 1), "the node has it by its digest");
        // A broker that lost its store gets it again.
        broker.forget_models();
        let third = client(&broker, &there);
        third.until_ready().await.unwrap();
        assert_eq!((broker.seen().uploads, files.asked().len()), (2, 2));
    }
}

#[tokio::test]
async fn a_function_whose_model_does_not_come_says_so() {
    let broker = FakeBroker::start(doubler());
    let files = Files::start(|_, _| Answer::whole("\"1\"", &model(9))).await;
    let client = client(&broker, &remote(&files.url("/m.onnx"), Some(digest(&model(1)))));
    let is_stuck = |state: &FunctionState| matches!(state, FunctionState::Unfetched(_));
    let state = client.function().wait_for(is_stuck).await.unwrap().clone();
    assert!(state.to_string().contains("was wanted"), "{state}");
    assert_eq!(broker.seen().uploads, 0);
}

#[tokio::test]
async fn weights_that_another_pod_brought_meanwhile_need_no_server() {
    let broker = FakeBroker::start(doubler());
    broker.forget_models();
    let files = Files::start(|_, _| Answer::status("404 Not Found")).await;
    let client = client(&broker, &remote(&files.url("/m.onnx"), Some(support::digest())));
    client.function().wait_for(|state| matches!(state, FunctionState::Unfetched(_))).await.unwrap();
    broker.knows_again();
    client.until_ready().await.unwrap();
}

#[tokio::test]
async fn a_date_alone_is_trusted_only_where_a_digest_will_tell() {
    let file = model(1);
    let dated = |body: &[u8]| {
        let lines =
            ["Last-Modified: Wed, 25 Nov 2026 01:00:00 GMT".to_owned(), format!("Content-Length: {}", body.len())];
        Answer::new("200 OK", &lines, body)
    };
    for (pinned, range) in [(Some(digest(&file)), "bytes=200001-"), (None, "")] {
        let served = file.clone();
        let files = Files::start(move |before, asked| match (before, asked.header("range")) {
            (0, _) => dated(&served).cut(100_000),
            (_, "") => dated(&served),
            _ => Answer::rest("\"1\"", &served, start(asked)),
        })
        .await;
        fetched(&remote(&files.url("/m.onnx"), pinned)).await.unwrap();
        assert_eq!(files.asked()[1].header("range"), range);
    }
}

/// The program as a front, its log, and what its readiness says once that holds what is looked for.
async fn front_says(variables: &[(&str, &str)], looked_for: &str) -> (String, String) {
    let port = support::ports::free_port().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_faaswap-sidecar"))
        .env_clear()
        .envs([("FAASWAP_MODE", "watchdog"), ("OPENFAAS_NAME", support::NAME), ("FAASWAP_LISTEN", "127.0.0.1:0")])
        .envs([("FAASWAP_METRICS_LISTEN", "off"), ("FAASWAP_LOG", "trace"), ("write_timeout", "1s")])
        .env("TMPDIR", folder.path())
        .env("port", port.port().to_string())
        .envs(variables.iter().copied())
        .kill_on_drop(true)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let log = tokio::spawn(async move {
        let mut log = String::new();
        while let Ok(Some(line)) = lines.next_line().await {
            log.push_str(&line);
        }
        log
    });
    let http = Http::new(port);
    let tries = async {
        loop {
            if tokio::net::TcpStream::connect(port).await.is_ok() {
                assert_eq!(http.get("/_/health").await.status, 200, "liveness is not readiness");
                let ready = http.get("/_/ready").await;
                let said = String::from_utf8(ready.body.to_vec()).unwrap();
                if said.contains(looked_for) {
                    return said;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let said = tokio::time::timeout(Duration::from_secs(60), tries).await.expect("what is looked for is said");
    child.kill().await.unwrap();
    (said, log.await.unwrap())
}

#[tokio::test]
async fn a_front_lives_while_its_model_comes_and_tells_no_secrets() {
    let broker = FakeBroker::start(doubler());
    let file = model(1);
    let socket = broker.socket();
    let socket = ("FAASWAP_BROKER_SOCKET", socket.to_str().unwrap());
    let auth = ("FAASWAP_MODEL_AUTH", "Bearer s3cret");
    let hex = digest(&file).hex();

    let slow = file.clone();
    let files = Files::start(move |_, _| Answer::whole("\"1\"", &slow).cut(1000).hanging()).await;
    let url = files.url(&format!("/m.onnx?sig=s3cret#sha256={hex}"));
    let (said, log) = front_says(&[socket, auth, ("FAASWAP_MODEL", &url)], "99 %").await;
    assert!(said.contains("fetching the model: ") && said.contains("of m.onnx"), "{said}");
    assert!(!log.contains("s3cret") && log.contains("/m.onnx"), "{log}");
    assert_eq!(files.asked()[0].header("authorization"), "Bearer s3cret");

    let files = Files::start(|_, _| Answer::status("404 Not Found")).await;
    let url = files.url(&format!("/m.onnx?sig=s3cret#sha256={hex}"));
    let (_, log) = front_says(&[socket, auth, ("FAASWAP_MODEL", &url)], "there is no such file").await;
    assert!(!log.contains("s3cret"), "{log}");
}

#[tokio::test]
async fn https_needs_an_authority_that_is_known() {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("ca.pem");
    std::fs::write(&bundle, key.cert.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let private = rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private.into())
        .unwrap();
    let file = model(1);
    let served = file.clone();
    let files = Files::serve(Some(Arc::new(server).into()), move |_, _| Answer::whole("\"1\"", &served)).await;
    let url = format!("https://localhost:{}/m.onnx", files.address.port());
    let broker = FakeBroker::start(doubler());
    broker.forget_models();
    let socket = broker.socket();
    let there = [("FAASWAP_BROKER_SOCKET", socket.to_str().unwrap()), ("FAASWAP_MODEL", &url)];
    let none = folder.path().join("none.pem");
    std::fs::write(&none, "").unwrap();
    front_says(&[&there[..], &[("SSL_CERT_FILE", none.to_str().unwrap())]].concat(), "SSL_CERT_FILE").await;
    assert_eq!(files.asked().len(), 0);
    // No digest is pinned: it is fetched first and known then.
    front_says(&[&there[..], &[("SSL_CERT_FILE", bundle.to_str().unwrap())]].concat(), "OK").await;
    assert_eq!((files.asked().len(), broker.seen().uploads), (1, 1));
}
