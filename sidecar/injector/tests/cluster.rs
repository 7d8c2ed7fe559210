//! Certificates against an API server that is played here, and reviews over real TLS.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Parser;
use faaswap_injector::{
    certificate::Leaf,
    keeper::{KeepError, refresh},
    limits::{AUTHORITY_LIFE, CERTIFICATE_LIFE},
    server::{Shared, serve, tls},
    settings::Settings,
};
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

const NOW: i64 = 1_790_000_000;

/// An API server with a webhook configuration and Secrets; `steal`: another replica writes first.
#[derive(Debug, Default)]
struct Cluster {
    secrets: BTreeMap<String, Value>,
    bundle: String,
    patches: usize,
    steal: Option<Value>,
}

type Shop = Arc<Mutex<Cluster>>;

fn reply(status: u16, body: &Value) -> Response<Body> {
    Response::builder().status(status).body(Body::from(body.to_string().into_bytes())).unwrap()
}

fn status(code: u16) -> Response<Body> {
    let reason = if code == 404 { "NotFound" } else { "Conflict" };
    reply(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no"}),
    )
}

async fn answer(cluster: Shop, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let mut cluster = cluster.lock().unwrap();
    let path = parts.uri.path().to_owned();
    let name = path.rsplit('/').next().unwrap().to_owned();
    if path.contains("/mutatingwebhookconfigurations/") {
        if parts.method == Method::PATCH {
            assert_eq!(json[0]["path"], "/webhooks/0/clientConfig/caBundle");
            cluster.bundle = json[0]["value"].as_str().unwrap().to_owned();
            cluster.patches += 1;
        }
        let config = json!({"service": {"name": "s", "namespace": "n"}, "caBundle": cluster.bundle});
        let hook = json!({"name": "inject.faaswap.dev", "clientConfig": config, "admissionReviewVersions": ["v1"], "sideEffects": "None"});
        return Ok(reply(200, &json!({"metadata": {"name": name}, "webhooks": [hook]})));
    }
    if parts.method == Method::GET {
        return Ok(cluster.secrets.get(&name).map_or_else(|| status(404), |secret| reply(200, secret)));
    }
    if let Some(stolen) = cluster.steal.take() {
        cluster.secrets.insert(stolen["metadata"]["name"].as_str().unwrap().to_owned(), stolen);
        return Ok(status(409));
    }
    let name = json["metadata"]["name"].as_str().unwrap().to_owned();
    let version = |secret: &Value| secret["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
    let there = cluster.secrets.get(&name).map(version);
    if (parts.method == Method::POST && there.is_some()) || there.clone().is_some_and(|there| there != version(&json)) {
        return Ok(status(409));
    }
    let mut stored = json;
    let next = there.and_then(|there| there.parse::<u64>().ok()).unwrap_or(0) + 1;
    stored["metadata"]["resourceVersion"] = next.to_string().into();
    cluster.secrets.insert(name, stored.clone());
    Ok(reply(200, &stored))
}

fn client(cluster: &Shop) -> kube::Client {
    let cluster = Arc::clone(cluster);
    kube::Client::new(tower::service_fn(move |request| answer(Arc::clone(&cluster), request)), "default")
}

fn settings() -> Settings {
    Settings::try_parse_from(["injector"]).unwrap()
}

async fn look<'a>(cluster: &Shop, leaf: &'a mut Option<Leaf>, now: i64) -> Result<&'a Leaf, KeepError> {
    refresh(client(cluster), &settings(), leaf, now).await
}

fn trusted(cluster: &Shop) -> Vec<CertificateDer<'static>> {
    let pem = STANDARD.decode(&cluster.lock().unwrap().bundle).unwrap();
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().unwrap()
}

#[tokio::test]
async fn replicas_share_one_authority_that_the_api_server_is_told_to_trust_once() {
    let cluster = Shop::default();
    let (mut first, mut second) = (None, None);
    look(&cluster, &mut first, NOW).await.unwrap();
    look(&cluster, &mut second, NOW).await.unwrap();
    assert_eq!((trusted(&cluster).len(), cluster.lock().unwrap().patches), (1, 1));
    let kept = Arc::as_ptr(&first.as_ref().unwrap().key);
    assert_eq!(Arc::as_ptr(&look(&cluster, &mut first, NOW + 60).await.unwrap().key), kept, "what is young stays");
}

#[tokio::test]
async fn certificates_and_authorities_are_renewed_before_they_end() {
    let cluster = Shop::default();
    let mut leaf = None;
    let mut now = NOW;
    let hour = 3600;
    let (mut authorities, mut ends) = (1, look(&cluster, &mut leaf, now).await.unwrap().ends);
    let mut bundle = cluster.lock().unwrap().bundle.clone();
    let until = NOW + i64::try_from(AUTHORITY_LIFE.as_secs()).unwrap() + 1;
    while now < until {
        now += 24 * hour;
        let fresh = look(&cluster, &mut leaf, now).await.unwrap();
        assert!(fresh.ends - now > 24 * hour, "a certificate was about to end");
        assert!(fresh.ends >= ends && fresh.ends - now <= i64::try_from(CERTIFICATE_LIFE.as_secs()).unwrap());
        ends = fresh.ends;
        let seen = cluster.lock().unwrap().bundle.clone();
        if seen != bundle {
            authorities += 1;
            bundle = seen;
            assert_eq!(trusted(&cluster).len(), 2, "the one before is still trusted");
        }
    }
    assert_eq!(authorities, 2);
}

#[tokio::test]
async fn the_replica_that_writes_second_takes_the_authority_of_the_first() {
    let (other, cluster) = (Shop::default(), Shop::default());
    look(&other, &mut None, NOW).await.unwrap();
    let theirs = other.lock().unwrap().secrets.values().next().unwrap().clone();
    cluster.lock().unwrap().steal = Some(theirs);
    look(&cluster, &mut None, NOW).await.unwrap();
    assert_eq!(cluster.lock().unwrap().bundle, other.lock().unwrap().bundle);
}

#[tokio::test]
async fn a_client_of_a_real_cluster_can_be_made_with_the_tls_that_is_compiled_in() {
    let cluster = Shop::default();
    look(&cluster, &mut None, NOW).await.unwrap();
    let mut config = kube::Config::new("https://10.96.0.1".parse().unwrap());
    config.root_cert = Some(trusted(&cluster).iter().map(|certificate| certificate.to_vec()).collect());
    assert_eq!(kube::Client::try_from(config).unwrap().default_namespace(), "default");
}

#[tokio::test]
async fn reviews_are_answered_over_tls_by_a_certificate_that_the_bundle_vouches_for() {
    let cluster = Shop::default();
    let mut leaf = None;
    // The verifier below looks at the real clock.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let leaf = look(&cluster, &mut leaf, i64::try_from(now).unwrap()).await.unwrap();
    let stop = CancellationToken::new();
    let shared = Shared::new(settings(), stop.clone());
    let current = Arc::new(faaswap_injector::keeper::Current::default());
    current.set(Arc::clone(&leaf.key));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls(current).unwrap()));
    tokio::spawn(serve(listener, shared.reviews(), Some(acceptor), stop));

    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(trusted(&cluster));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let connect = async |name: &'static str| {
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
        connector.connect(ServerName::try_from(name).unwrap(), stream).await
    };
    assert!(connect("elsewhere.faaswap-system.svc").await.is_err(), "another name is not vouched for");
    let mut stream = connect("faaswap-injector.faaswap-system.svc").await.unwrap();
    let review = include_str!("golden/knative.review.json");
    let head = format!(
        "POST /mutate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        review.len()
    );
    stream.write_all(format!("{head}{review}").as_bytes()).await.unwrap();
    let mut reply = String::new();
    // The other side may close without a farewell.
    let _closed = stream.read_to_string(&mut reply).await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("\"patchType\":\"JSONPatch\""), "{reply}");
}
