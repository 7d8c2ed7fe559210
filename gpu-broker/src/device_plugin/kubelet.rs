//! The two sockets: ours, which the kubelet asks, and the kubelet's, where we register. Both in its folder.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    KUBELET_SOCKET, LOOK_EVERY, OUR_SOCKET, PluginError, PluginSettings, RESOURCE, VERSION,
    service::Slots,
    v1beta1::{
        DevicePluginOptions, RegisterRequest, device_plugin_server::DevicePluginServer,
        registration_client::RegistrationClient,
    },
};

/// How long the kubelet may take to answer a registration.
const REGISTER_WITHIN: Duration = Duration::from_secs(10);

fn failed(path: &Path) -> impl FnOnce(io::Error) -> PluginError {
    let path: PathBuf = path.to_owned();
    move |error| PluginError::Socket { path, error }
}

/// Which file lies there now; another one of the same name is another one.
fn identity(path: &Path) -> Option<(u64, u64, i64)> {
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino(), file.ctime_nsec()))
}

/// Serves and registers; ends when either socket is no longer what it was.
pub(super) async fn serve_one(
    settings: &PluginSettings,
    slots: u32,
    healthy: &watch::Receiver<bool>,
) -> Result<(), PluginError> {
    let (ours, kubelet) = (settings.plugin_dir.join(OUR_SOCKET), settings.plugin_dir.join(KUBELET_SOCKET));
    // One that an earlier process left there cannot be bound again.
    let _absent = std::fs::remove_file(&ours);
    let listener = UnixListener::bind(&ours).map_err(failed(&ours))?;
    let service = DevicePluginServer::from_arc(Arc::new(Slots {
        count: slots,
        healthy: healthy.clone(),
        socket_dir: settings.socket_dir.clone(),
        models_dir: settings.models_dir.clone(),
    }));
    let accepting = accept(&listener, service);
    let before = (identity(&ours), identity(&kubelet));
    let watching = async {
        timeout(REGISTER_WITHIN, register(&kubelet)).await.map_err(|_| PluginError::Silent)??;
        tracing::info!(resource = RESOURCE, slots, "registered with the kubelet");
        while (identity(&ours), identity(&kubelet)) == before {
            sleep(LOOK_EVERY).await;
        }
        tracing::info!("the kubelet started again");
        Ok(())
    };
    tokio::select! {
        outcome = watching => outcome,
        error = accepting => Err(failed(&ours)(error)),
    }
}

async fn accept(listener: &UnixListener, service: DevicePluginServer<Slots>) -> io::Error {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => return error,
        };
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the kubelet's connection ended");
            }
        });
    }
}

async fn register(kubelet: &Path) -> Result<(), PluginError> {
    let stream = UnixStream::connect(kubelet).await.map_err(failed(kubelet))?;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let service =
        tower::service_fn(move |request: http::Request<tonic::body::Body>| sender.clone().send_request(request));
    let mut client = RegistrationClient::with_origin(service, http::Uri::from_static("http://localhost"));
    let request = RegisterRequest {
        version: VERSION.to_owned(),
        endpoint: OUR_SOCKET.to_owned(),
        resource_name: RESOURCE.to_owned(),
        options: Some(DevicePluginOptions::default()),
    };
    let outcome = client.register(request).await;
    connection.abort();
    outcome.map(|_| ()).map_err(|status| PluginError::Declined(Box::new(status)))
}
