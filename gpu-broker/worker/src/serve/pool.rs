//! The pools of GPUs, shared by their descriptors: a worker copies weights from another one's without asking it.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, PoisonError},
    thread,
};

use faaswap_protocol::Bytes;
use faaswap_slab::fds::FDS_PER_MESSAGE_MAX;

use super::Worker;
use crate::message::{Answer, Call, Fault, FromWorker};

/// Chunks of other GPUs' pools that have come, until all have.
pub(super) type Arriving = HashMap<u32, Vec<OwnedFd>>;

impl Worker {
    /// Gives the pool's chunks to the broker, for other workers, or for that of one other GPU.
    pub(super) fn share(&self, to: Option<u32>) -> Result<Answer, Fault> {
        let Some(cuda) = self.device.as_cuda() else { return Ok(Answer::Done) };
        for some in cuda.export_pool()?.chunks(FDS_PER_MESSAGE_MAX) {
            let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            self.wire.send(&FromWorker::Chunks { to }, &some).map_err(|error| Fault::Other(error.to_string()))?;
        }
        Ok(Answer::Done)
    }

    /// Gives another GPU's pool up, also what has come of it.
    pub(super) fn forget_pool(self: &Arc<Self>, call: Call, gpu: u32) {
        drop(self.arriving.lock().unwrap_or_else(PoisonError::into_inner).remove(&gpu));
        self.beside(call, move |worker| {
            worker.device.as_cuda().inspect(|cuda| cuda.forget_pool(gpu));
            Ok(Answer::Done)
        });
    }

    /// Some chunks of another GPU's pool came. The last of them are followed by mapping all, which takes a while.
    pub(super) fn chunks_came(self: &Arc<Self>, gpu: u32, fds: Vec<OwnedFd>, chunk: Bytes, of: u32) {
        let mut arriving = self.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        let come = arriving.entry(gpu).or_default();
        come.extend(fds);
        if come.len() < usize::try_from(of).unwrap_or(usize::MAX) {
            return;
        }
        let chunks = arriving.remove(&gpu).unwrap_or_default();
        drop(arriving);
        let worker = Arc::clone(self);
        let import = move || {
            if let Some(cuda) = worker.device.as_cuda()
                && let Err(error) = cuda.import_pool(gpu, &chunks, chunk)
            {
                tracing::warn!(%error, gpu, "weights of that GPU come from host memory instead");
            }
        };
        if let Err(error) = thread::Builder::new().name("import".to_owned()).spawn(import) {
            tracing::warn!(%error, gpu, "weights of that GPU come from host memory instead");
        }
    }
}
