//! What the kubelet asks: which slots there are, and what comes with one.

use std::{collections::HashMap, path::PathBuf};

use tokio::sync::{mpsc, watch};
use tonic::{
    Request, Response, Status,
    codegen::{BoxStream, tokio_stream::wrappers::ReceiverStream},
};

use super::v1beta1::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, DevicePluginOptions, Empty,
    ListAndWatchResponse, Mount, device_plugin_server::DevicePlugin,
};

/// Lists that the kubelet has not taken yet; only the newest counts.
const LISTS_MAX: usize = 1;
/// Containers in one request; a pod has a few.
const CONTAINERS_MAX: usize = 256;

/// The slots of this node.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) count: u32,
    pub(super) healthy: watch::Receiver<bool>,
    pub(super) socket_dir: PathBuf,
    pub(super) models_dir: Option<PathBuf>,
}

fn list(count: u32, healthy: bool) -> ListAndWatchResponse {
    let health = if healthy { "Healthy" } else { "Unhealthy" };
    let slot = |n| Device { id: format!("slot-{n}"), health: health.to_owned(), topology: None };
    ListAndWatchResponse { devices: (0..count).map(slot).collect() }
}

impl Slots {
    fn has(&self, id: &str) -> bool {
        let number = id.strip_prefix("slot-").and_then(|number| number.parse::<u32>().ok());
        number.is_some_and(|number| number < self.count)
    }

    /// Folders at the same place in the pod as on the node, and none that can be written.
    fn allocation(&self) -> ContainerAllocateResponse {
        let mount =
            |container: String, host: String| Mount { container_path: container, host_path: host, read_only: true };
        let socket_dir = self.socket_dir.display().to_string();
        let models = self.models_dir.as_ref().map(|folder| mount("/models".to_owned(), folder.display().to_string()));
        let socket = format!("{socket_dir}/broker.sock");
        ContainerAllocateResponse {
            envs: HashMap::from([("FAASWAP_BROKER_SOCKET".to_owned(), socket)]),
            mounts: std::iter::once(mount(socket_dir.clone(), socket_dir)).chain(models).collect(),
            ..ContainerAllocateResponse::default()
        }
    }
}

#[tonic::async_trait]
impl DevicePlugin for Slots {
    async fn get_device_plugin_options(&self, _: Request<Empty>) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(DevicePluginOptions::default()))
    }

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<BoxStream<ListAndWatchResponse>>, Status> {
        let (lists, stream) = mpsc::channel(LISTS_MAX);
        let (count, mut healthy) = (self.count, self.healthy.clone());
        tokio::spawn(async move {
            loop {
                let now = *healthy.borrow_and_update();
                if lists.send(Ok(list(count, now))).await.is_err() {
                    return;
                }
                tokio::select! {
                    changed = healthy.changed() => if changed.is_err() { return },
                    () = lists.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let containers = request.into_inner().container_requests;
        if containers.len() > CONTAINERS_MAX {
            return Err(Status::invalid_argument(format!("{} containers, at most {CONTAINERS_MAX}", containers.len())));
        }
        if let Some(unknown) = containers.iter().flat_map(|one| &one.devices_ids).find(|id| !self.has(id)) {
            return Err(Status::invalid_argument(format!(
                "'{unknown}' is no slot of this node, which has {}",
                self.count
            )));
        }
        tracing::info!(containers = containers.len(), "slots allocated");
        let container_responses = containers.iter().map(|_| self.allocation()).collect();
        Ok(Response::new(AllocateResponse { container_responses }))
    }
}
