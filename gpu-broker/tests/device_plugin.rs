//! The device plugin against a kubelet that is played here, over the sockets and messages that the real one uses.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Json, Router, http::StatusCode, routing::get};
use faaswap_broker::device_plugin::{
    self, PluginSettings,
    v1beta1::{
        AllocateRequest, ContainerAllocateRequest, Empty, ListAndWatchResponse, RegisterRequest,
        device_plugin_client::DevicePluginClient,
        registration_server::{Registration, RegistrationServer},
    },
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

struct Registrar(mpsc::UnboundedSender<RegisterRequest>);

#[tonic::async_trait]
impl Registration for Registrar {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        self.0.send(request.into_inner()).unwrap();
        Ok(Response::new(Empty {}))
    }
}

/// A kubelet, until dropped.
struct Kubelet {
    registered: mpsc::UnboundedReceiver<RegisterRequest>,
    serving: JoinHandle<()>,
}

impl Kubelet {
    /// As at its start: whatever sockets are in its folder go.
    fn start(folder: &Path) -> Self {
        for file in std::fs::read_dir(folder).unwrap() {
            // The plugin may have removed its own.
            let _absent = std::fs::remove_file(file.unwrap().path());
        }
        let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
        let (told, registered) = mpsc::unbounded_channel();
        let service = RegistrationServer::new(Registrar(told));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service.clone())));
            }
        });
        Self { registered, serving }
    }

    async fn registration(&mut self) -> RegisterRequest {
        timeout(SOON, self.registered.recv()).await.expect("it registers").unwrap()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The broker's admin port, as far as the plugin looks at it.
async fn admin(ready: Arc<AtomicBool>, lost: Arc<AtomicBool>) -> SocketAddr {
    let readyz = move || {
        let status = if ready.load(Ordering::Relaxed) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        std::future::ready(status)
    };
    let devices = move || {
        let lost = lost.load(Ordering::Relaxed);
        std::future::ready(Json(serde_json::json!([{"name": "gpu0", "lost": lost}, {"name": "gpu1", "lost": true}])))
    };
    let app = Router::new().route("/readyz", get(readyz)).route("/v1/devices", get(devices));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

struct Node {
    folder: TempDir,
    kubelet: Kubelet,
    ready: Arc<AtomicBool>,
    lost: Arc<AtomicBool>,
    stop: CancellationToken,
    plugin: JoinHandle<()>,
}

impl Node {
    async fn start(slots: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kubelet = Kubelet::start(folder.path());
        let (ready, lost) = (Arc::new(AtomicBool::new(true)), Arc::default());
        let settings = PluginSettings {
            plugin_dir: folder.path().to_owned(),
            socket_dir: PathBuf::from("/run/faaswap"),
            models_dir: Some(PathBuf::from("/var/lib/faaswap/models")),
            slots: Some(slots),
            admin: admin(Arc::clone(&ready), Arc::clone(&lost)).await,
        };
        let stop = CancellationToken::new();
        let plugin = tokio::spawn(device_plugin::run(settings, stop.clone()));
        Self { folder, kubelet, ready, lost, stop, plugin }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("faaswap.sock")
    }
}

/// The kubelet's side of the plugin's socket.
macro_rules! client {
    ($socket:expr) => {{
        let stream = UnixStream::connect($socket).await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let service =
            tower::service_fn(move |request: http::Request<tonic::body::Body>| sender.clone().send_request(request));
        DevicePluginClient::with_origin(service, http::Uri::from_static("http://localhost"))
    }};
}

/// The health that all slots of the next list share.
async fn health(lists: &mut Streaming<ListAndWatchResponse>) -> (usize, String) {
    let list = timeout(SOON, lists.message()).await.expect("a list comes").unwrap().unwrap();
    let health = list.devices[0].health.clone();
    assert!(list.devices.iter().all(|slot| slot.health == health), "{list:?}");
    (list.devices.len(), health)
}

#[tokio::test]
async fn it_registers_and_lists_slots_whose_health_follows_the_brokers_devices() {
    let mut node = Node::start(3).await;
    let registration = node.kubelet.registration().await;
    assert_eq!((registration.version.as_str(), registration.endpoint.as_str()), ("v1beta1", "faaswap.sock"));
    assert_eq!(registration.resource_name, "faaswap.dev/slot");
    let mut client = client!(node.socket());
    let mut lists = client.list_and_watch(Empty {}).await.unwrap().into_inner();
    let mut first = health(&mut lists).await;
    if first.1 == "Unhealthy" {
        // The broker had not been asked yet.
        first = health(&mut lists).await;
    }
    assert_eq!(first, (3, "Healthy".to_owned()));
    node.lost.store(true, Ordering::Relaxed);
    assert_eq!(health(&mut lists).await, (3, "Unhealthy".to_owned()), "every device is lost");
    node.lost.store(false, Ordering::Relaxed);
    assert_eq!(health(&mut lists).await, (3, "Healthy".to_owned()));
    node.ready.store(false, Ordering::Relaxed);
    assert_eq!(health(&mut lists).await, (3, "Unhealthy".to_owned()), "the broker drains");
}

#[tokio::test]
async fn a_slot_comes_with_the_sockets_folder_that_cannot_be_written_and_says_where_it_is() {
    let mut node = Node::start(2).await;
    node.kubelet.registration().await;
    let mut client = client!(node.socket());
    let ask = |ids: &[&str]| {
        let one = |id: &&str| ContainerAllocateRequest { devices_ids: vec![(*id).to_owned()] };
        AllocateRequest { container_requests: ids.iter().map(one).collect() }
    };
    let given = client.allocate(ask(&["slot-0", "slot-1"])).await.unwrap().into_inner().container_responses;
    assert_eq!(given.len(), 2);
    assert_eq!(given[0].envs["FAASWAP_BROKER_SOCKET"], "/run/faaswap/broker.sock");
    let mounts: Vec<_> = given[0].mounts.iter().map(|m| (m.host_path.as_str(), m.container_path.as_str())).collect();
    assert_eq!(mounts, [("/run/faaswap", "/run/faaswap"), ("/var/lib/faaswap/models", "/models")]);
    assert!(given[0].mounts.iter().all(|mount| mount.read_only));
    for nonsense in ["slot-2", "slot--1", "gpu-0", ""] {
        let refused = client.allocate(ask(&[nonsense])).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{nonsense}");
    }
}

#[tokio::test]
async fn it_registers_again_when_the_kubelet_starts_again() {
    let mut node = Node::start(1).await;
    node.kubelet.registration().await;
    node.kubelet = Kubelet::start(node.folder.path());
    node.kubelet.registration().await;
    let options = client!(node.socket()).get_device_plugin_options(Empty {}).await.unwrap().into_inner();
    assert!(!options.pre_start_required);
}

#[tokio::test]
async fn it_waits_for_a_kubelet_that_is_not_there_yet_and_leaves_nothing_behind() {
    let mut node = Node::start(1).await;
    node.kubelet.registration().await;
    std::fs::remove_file(node.folder.path().join("kubelet.sock")).unwrap();
    sleep(Duration::from_millis(10)).await;
    node.kubelet = Kubelet::start(node.folder.path());
    node.kubelet.registration().await;
    node.stop.cancel();
    timeout(SOON, node.plugin).await.expect("it ends").unwrap();
    assert!(!node.folder.path().join("faaswap.sock").exists());
}
