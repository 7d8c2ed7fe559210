//! One connection's task: reads frames and hands them to the loop, writes what waits in the outbox, and ends well.

use std::{cell::RefCell, os::fd::OwnedFd, rc::Rc, sync::Arc};

use faaswap_protocol::{Detail, FromBroker, Refusal};
use tokio::{sync::Notify, time::timeout};

use crate::{
    core::{Core, Next, Owner, PeerId},
    frames::{Frames, Phase},
    lane::Peer,
    limits::{HELLO_WITHIN, READ_BYTES},
    socket::{Outbox, Socket},
    telemetry::Telemetry,
};

/// How a connection ended.
enum End {
    /// The peer, or we, closed it.
    Closed,
    /// The peer broke the protocol.
    Violation(String),
}

thread_local! {
    /// One buffer for all connections: a read is handed on before the next one.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

pub(super) async fn serve(
    core: Rc<RefCell<Core>>,
    telemetry: &Telemetry,
    socket: Socket,
    owner: Owner,
    evict: Rc<Notify>,
) {
    let peer = Arc::new(Peer { outbox: Outbox::new(socket), shared: Default::default() });
    let id = core.borrow_mut().new_peer_id();
    let mut connection =
        Connection { core: Rc::clone(&core), peer: Arc::clone(&peer), id, frames: Frames::default(), fds: Vec::new() };
    let greeted = tokio::select! {
        greeted = timeout(HELLO_WITHIN, connection.greet(owner)) => {
            greeted.unwrap_or_else(|_| Err(End::Violation(format!("no hello within {HELLO_WITHIN:?}"))))
        }
        () = evict.notified() => Err(End::Violation("too many connections have not said hello".to_owned())),
    };
    // The place among the strangers is free from here on.
    drop(evict);
    let end = match greeted {
        Ok(phase) => connection.talk(phase).await,
        Err(end) => end,
    };
    if let End::Violation(what) = end {
        tracing::warn!(peer = id.0, what, "peer cut off");
        telemetry.peers_cut_off.inc();
        let refusal = Refusal::ProtocolViolation { reason: Detail::from(what) };
        peer.outbox.send(&FromBroker::Closing { refusal }, Vec::new());
    }
    core.borrow_mut().gone(id);
    peer.outbox.close();
    peer.outbox.socket().shut_down();
}

struct Connection {
    core: Rc<RefCell<Core>>,
    peer: Arc<Peer>,
    id: PeerId,
    frames: Frames,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Reads once. Cancel safe: what was read is kept at once.
    async fn read(&mut self) -> Result<(), End> {
        self.peer.outbox.socket().readable().await.map_err(|_| End::Closed)?;
        let read = SCRATCH.with_borrow_mut(|scratch| {
            let read = self.peer.outbox.socket().try_read(scratch, &mut self.fds)?;
            self.frames.push(&scratch[..read]);
            Ok::<_, std::io::Error>(read)
        });
        match read {
            Ok(0) => Err(End::Closed),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => Err(End::Violation(error.to_string())),
            Err(_) => Err(End::Closed),
        }
    }

    async fn greet(&mut self, owner: Owner) -> Result<Phase, End> {
        loop {
            if let Some((message, _)) = self.frames.next(Phase::Greeting).map_err(violation)? {
                let mut core = self.core.borrow_mut();
                return core.greet(self.id, &self.peer, owner, message).map_err(End::Violation);
            }
            self.read().await?;
            if !self.fds.is_empty() {
                return Err(End::Violation("descriptors came before the hello".to_owned()));
            }
        }
    }

    async fn talk(&mut self, phase: Phase) -> End {
        loop {
            if let Err(end) = self.take_frames(phase).await {
                return end;
            }
            if self.peer.outbox.is_closed() {
                return End::Closed;
            }
            let peer = Arc::clone(&self.peer);
            let outcome = tokio::select! {
                read = self.read() => read,
                flushed = peer.outbox.flush(), if peer.outbox.has_waiting() => flushed.map_err(|_| End::Closed),
                () = peer.outbox.wake.notified() => Ok(()),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    async fn take_frames(&mut self, phase: Phase) -> Result<(), End> {
        while let Some((message, payload)) = self.frames.next(phase).map_err(violation)? {
            let next = self.core.borrow_mut().take_message(self.id, message, payload, &mut self.fds);
            match next.map_err(End::Violation)? {
                Next::Read => {}
                // Where the upload has ended, its answer says why.
                Next::Pass(parts, bytes) => drop(parts.send(bytes).await),
            }
        }
        if self.frames.is_empty() && !self.fds.is_empty() {
            return Err(End::Violation("descriptors came without an upload".to_owned()));
        }
        Ok(())
    }
}

fn violation(error: faaswap_protocol::wire::WireError) -> End {
    End::Violation(error.to_string())
}
