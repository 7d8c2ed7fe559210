//! Connections: what a peer may say when, and what is left to tidy up when it goes.

use std::{os::fd::OwnedFd, sync::Arc};

use bytes::Bytes as Buffer;
use faaswap_protocol::{
    Bytes, CallId, Detail, FromBroker, ModelDigest, ModelFile, Refusal, SlabLayout, ToBroker, Transport,
    limits::{NAME_BYTES_MAX, SLAB_BYTES_MAX, TENSOR_ALIGN, UPLOAD_PART_BYTES_MAX, WIRE_VERSION},
};
use faaswap_slab::Slab;
use tokio::sync::mpsc;

use super::{Core, Owner, PeerEntry, PeerId, requests::Infer};
use crate::{
    frames::Phase,
    lane::{Peer, Shared},
    limits::{SLAB_HALF_MIN, STALLED_AFTER, UPLOAD_PARTS_QUEUED_MAX},
    load,
    store::check_files,
};

/// An upload whose bytes come in frames.
#[derive(Debug)]
pub(super) struct UploadParts {
    call: CallId,
    /// Absent where files came as descriptors.
    parts: Option<mpsc::Sender<Buffer>>,
}

/// What the connection's task does after a message.
#[derive(Debug)]
pub(crate) enum Next {
    /// Go on.
    Read,
    /// Hand these bytes of a model on, waiting for room, then go on.
    Pass(mpsc::Sender<Buffer>, Buffer),
}

impl Core {
    /// A connection that has not said hello.
    pub(crate) fn new_peer_id(&mut self) -> PeerId {
        PeerId(self.new_id())
    }

    /// Answers a hello: from here on the connection is a peer. An error is a violation.
    pub(crate) fn greet(
        &mut self,
        id: PeerId,
        peer: &Arc<Peer>,
        owner: Owner,
        message: ToBroker,
    ) -> Result<Phase, String> {
        let ToBroker::Hello { version, transport, agent } = message else {
            return Err("the first message must be a hello".to_owned());
        };
        if version != WIRE_VERSION {
            return Err(format!("this broker speaks version {WIRE_VERSION}, the peer {version}: update one of them"));
        }
        if agent.len() > NAME_BYTES_MAX {
            return Err(format!("the agent's name is longer than {NAME_BYTES_MAX} bytes"));
        }
        let phase = match (transport, owner) {
            (Transport::Inline, _) => {
                peer.outbox.send(&FromBroker::Welcome { version: WIRE_VERSION, slab: None }, Vec::new());
                Phase::Inline
            }
            (Transport::Slab { .. }, Owner::Remote) => {
                return Err("a slab cannot be shared over TCP: ask for inline transport".to_owned());
            }
            (Transport::Slab { request, response }, Owner::User(_)) => {
                let layout = self.layout(request, response)?;
                let (slab, fd) = Slab::create(layout).map_err(|e| e.to_string())?;
                let welcome = FromBroker::Welcome { version: WIRE_VERSION, slab: Some(layout) };
                peer.outbox.send_with_fd(&welcome, &fd).map_err(|e| e.to_string())?;
                // Set once: a connection is greeted once.
                let _ = peer.shared.set(Shared::new(slab));
                Phase::Slab
            }
        };
        tracing::debug!(peer = id.0, agent, ?phase, "connected");
        let entry = PeerEntry {
            peer: Arc::clone(peer),
            owner,
            agent,
            functions: Default::default(),
            function_next: 0,
            in_flight: Default::default(),
            inline_bytes: 0,
            unreleased: Default::default(),
            calls: 0,
            upload: None,
        };
        if self.draining {
            entry.peer.outbox.send(&FromBroker::Draining, Vec::new());
        }
        self.peers.insert(id, entry);
        Ok(phase)
    }

    /// The slab that a peer gets: what it asks for in whole slots, cut to what the node allows.
    fn layout(&self, request: Bytes, response: Bytes) -> Result<SlabLayout, String> {
        let total = request.checked_add(response).filter(|total| *total <= SLAB_BYTES_MAX);
        let total = total.ok_or_else(|| format!("a slab has at most {SLAB_BYTES_MAX}"))?;
        let most = self.settings.slab_max;
        let share = |half: Bytes| {
            let wanted = if total > most {
                // Both shrink alike; the product of two such sizes fits in 128 bits.
                u64::try_from(u128::from(half.get()) * u128::from(most.get()) / u128::from(total.get())).unwrap_or(0)
            } else {
                half.get()
            };
            Bytes::new((wanted.max(SLAB_HALF_MIN) / TENSOR_ALIGN) * TENSOR_ALIGN)
        };
        Ok(SlabLayout { request: share(request), response: share(response) })
    }

    /// Takes a message of a greeted peer. An error is a violation: the connection ends.
    pub(crate) fn take_message(
        &mut self,
        from: PeerId,
        message: ToBroker,
        payload: Buffer,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Next, String> {
        self.take_ended();
        let carries = matches!(message, ToBroker::Infer { .. } | ToBroker::UploadPart { .. });
        if !carries && !payload.is_empty() {
            return Err(format!("{} bytes of payload came with a message that has none", payload.len()));
        }
        match message {
            ToBroker::Hello { .. } => return Err("a second hello".to_owned()),
            ToBroker::Infer { request, function, inputs, outputs, time_left } => {
                if !payload.is_empty() && self.has_slab(from) {
                    return Err("a payload came from a peer with a slab".to_owned());
                }
                self.infer(from, Infer { request, function, inputs, outputs, time_left, payload })?;
            }
            ToBroker::Cancel { request } => self.cancel(from, request),
            ToBroker::Release { request } => self.release(from, request),
            ToBroker::Ping { nonce } => self.say(from, &FromBroker::Pong { nonce }),
            ToBroker::Expect { function, soon } => self.expect(from, function, soon),
            ToBroker::Register { call, function } => self.register(from, call, function),
            ToBroker::Hurry { call } => self.loading.values().for_each(|loading| loading.hurry(from, call)),
            ToBroker::Unregister { function } => self.unregister(from, function),
            ToBroker::Upload { call, model, files } => self.upload(from, call, model, files, std::mem::take(fds)),
            ToBroker::UploadPart { call } => return self.upload_part(from, call, payload),
        }
        Ok(Next::Read)
    }

    fn has_slab(&self, peer: PeerId) -> bool {
        self.peers.get(&peer).is_some_and(|entry| entry.peer.shared.get().is_some())
    }

    fn upload(&mut self, from: PeerId, call: CallId, model: ModelDigest, files: Vec<ModelFile>, fds: Vec<OwnedFd>) {
        let Some(entry) = self.peers.get_mut(&from) else { return };
        let refuse = |reason: String| Refusal::UploadFailed { reason: Detail::from(reason) };
        let remote = entry.owner == Owner::Remote;
        let checked = if entry.upload.is_some() {
            Err(refuse("one upload at a time on a connection".to_owned()))
        } else if self.draining {
            Err(Refusal::Draining)
        } else if !remote && fds.len() != files.len() {
            Err(refuse(format!("{} files were announced, {} descriptors came", files.len(), fds.len())))
        } else {
            check_files(&files, self.settings.model_max).map_err(refuse)
        };
        if let Err(refusal) = checked {
            return self.refuse_call(from, call, refusal);
        }
        let (parts, source) = if remote {
            let (parts, queue) = mpsc::channel(UPLOAD_PARTS_QUEUED_MAX);
            (Some(parts), load::Source::Parts(queue))
        } else {
            (None, load::Source::Files(fds))
        };
        entry.upload = Some(UploadParts { call, parts });
        let in_use: Vec<_> = self.models.values().map(|model| model.variant.digest.hex()).collect();
        let (loader, me) = (Arc::clone(&self.loader), self.me.clone());
        tokio::task::spawn_local(async move {
            let result = load::upload(&loader, model, files, source, in_use).await;
            if let Some(core) = me.upgrade() {
                core.borrow_mut().upload_ended(from, call, result);
            }
        });
    }

    fn upload_part(&mut self, from: PeerId, call: CallId, payload: Buffer) -> Result<Next, String> {
        if payload.len() > UPLOAD_PART_BYTES_MAX as usize {
            return Err(format!("a part of a model has at most {UPLOAD_PART_BYTES_MAX} bytes"));
        }
        let upload = self.peers.get(&from).and_then(|entry| entry.upload.as_ref());
        match upload.filter(|upload| upload.call == call).and_then(|upload| upload.parts.clone()) {
            Some(parts) => Ok(Next::Pass(parts, payload)),
            // The upload was refused while the peer was sending; it stops when it reads that.
            None => Ok(Next::Read),
        }
    }

    fn upload_ended(&mut self, from: PeerId, call: CallId, result: Result<(), Refusal>) {
        if let Some(entry) = self.peers.get_mut(&from) {
            entry.upload = None;
        }
        match result {
            Ok(()) => self.say(from, &FromBroker::Uploaded { call }),
            Err(refusal) => self.refuse_call(from, call, refusal),
        }
    }

    /// The connection is over: nothing of it stays.
    pub(crate) fn gone(&mut self, id: PeerId) {
        self.take_ended();
        let Some(entry) = self.peers.get(&id) else { return };
        entry.peer.outbox.close();
        let waiting: Vec<_> = entry.in_flight.values().copied().collect();
        for request in waiting {
            self.cancelled(request);
        }
        let Some(entry) = self.peers.remove(&id) else { return };
        for key in entry.functions.into_values() {
            self.leave(key);
        }
        for loading in self.loading.values_mut() {
            loading.forget(id);
        }
        tracing::debug!(peer = id.0, agent = entry.agent, "gone");
    }

    pub(super) fn cut_off_stalled(&mut self) {
        for (id, entry) in &self.peers {
            if entry.peer.outbox.stalled_since().is_some_and(|since| since.elapsed() > STALLED_AFTER) {
                tracing::warn!(peer = id.0, agent = entry.agent, "peer cut off: it reads nothing");
                self.telemetry.peers_cut_off.inc();
                entry.peer.outbox.close();
            }
        }
    }
}
