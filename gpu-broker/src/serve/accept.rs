//! Accepts connections, within limits: strangers that say nothing make room for those who do.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::Notify,
    task::{JoinHandle, spawn_local},
    time::{Instant, sleep},
};

use super::{ServeError, connection};
use crate::{
    config::Settings,
    core::{Core, Owner},
    limits::{CONNECTIONS_MAX, HALF_OPEN_MAX, HELLO_UNDISTURBED},
    socket::Socket,
    telemetry::Telemetry,
};

/// How long to wait after an accept failed: descriptors may have run out.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);
/// How often it is looked whether somebody has said hello, while all places are taken.
const PLACE_LOOK_EVERY: Duration = Duration::from_millis(2);

/// The open sockets.
pub(super) struct Listeners {
    unix: UnixListener,
    tcp: Option<TcpListener>,
    path: PathBuf,
}

/// The tasks that accept.
pub(super) struct Accepting {
    tasks: Vec<JoinHandle<()>>,
    path: PathBuf,
}

impl Accepting {
    pub(super) fn stop(&self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }

    pub(super) fn remove_socket(&self) {
        // Whether it is there or not: the next start replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

impl Listeners {
    pub(super) fn bind(settings: &Settings) -> Result<Self, ServeError> {
        let unix = bind_unix(&settings.socket, settings.socket_mode)
            .map_err(ServeError::io(format!("socket {}", settings.socket.display())))?;
        let tcp = settings.tcp_listen.map(|address| {
            let bound = std::net::TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                tracing::info!(address = %listener.local_addr()?, "TCP port is open");
                TcpListener::from_std(listener)
            });
            bound.map_err(ServeError::io(format!("tcp_listen {address}")))
        });
        Ok(Self { unix, tcp: tcp.transpose()?, path: settings.socket.clone() })
    }

    pub(super) fn accept(self, core: &Rc<RefCell<Core>>, telemetry: &Arc<Telemetry>) -> Accepting {
        let door = Rc::new(Door {
            core: Rc::clone(core),
            telemetry: Arc::clone(telemetry),
            strangers: RefCell::default(),
            open: Rc::new(()),
        });
        let mut tasks = vec![spawn_local(accept_unix(self.unix, Rc::clone(&door)))];
        tasks.extend(self.tcp.map(|tcp| spawn_local(accept_tcp(tcp, door))));
        Accepting { tasks, path: self.path }
    }
}

/// Binds, replacing a socket that a dead broker has left; never one that is alive.
fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another broker is listening there"));
        }
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// A connection that has not said hello, and since when; told to go when its place is needed.
type Stranger = (Weak<Notify>, Instant);

/// What lets connections in.
struct Door {
    core: Rc<RefCell<Core>>,
    telemetry: Arc<Telemetry>,
    strangers: RefCell<VecDeque<Stranger>>,
    /// One more reference per open connection.
    open: Rc<()>,
}

impl Door {
    /// Takes a place among the strangers. Where all are taken, the oldest has a little time to say hello.
    async fn place(&self) -> Rc<Notify> {
        let evict = Rc::new(Notify::new());
        loop {
            let oldest_may_stay = {
                let mut strangers = self.strangers.borrow_mut();
                // Those who have said hello, or have gone, hold no place any more.
                while strangers.front().is_some_and(|(first, _)| first.strong_count() == 0) {
                    strangers.pop_front();
                }
                if strangers.len() >= HALF_OPEN_MAX {
                    strangers.retain(|(stranger, _)| stranger.strong_count() > 0);
                }
                let oldest = strangers.front().filter(|_| strangers.len() >= HALF_OPEN_MAX);
                let may_stay = oldest.map(|(_, since)| HELLO_UNDISTURBED.saturating_sub(since.elapsed()));
                if may_stay.is_none_or(|left| left.is_zero()) {
                    if let Some(oldest) = may_stay.and_then(|_| strangers.pop_front()?.0.upgrade()) {
                        oldest.notify_one();
                    }
                    strangers.push_back((Rc::downgrade(&evict), Instant::now()));
                    return evict;
                }
                may_stay.unwrap_or_default()
            };
            sleep(oldest_may_stay.min(PLACE_LOOK_EVERY)).await;
        }
    }

    async fn enter(&self, socket: Socket, owner: Owner) {
        if Rc::strong_count(&self.open) > CONNECTIONS_MAX {
            tracing::warn!(limit = CONNECTIONS_MAX, "connection refused: too many are open");
            return;
        }
        let evict = self.place().await;
        let (core, telemetry, open) = (Rc::clone(&self.core), Arc::clone(&self.telemetry), Rc::clone(&self.open));
        spawn_local(async move {
            connection::serve(core, &telemetry, socket, owner, evict).await;
            drop(open);
        });
    }
}

async fn accept_unix(listener: UnixListener, door: Rc<Door>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) => door.enter(Socket::Unix(stream), Owner::User(peer.uid())).await,
                Err(error) => tracing::warn!(%error, "a peer's user id cannot be told"),
            },
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, door: Rc<Door>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection went at once");
                    continue;
                }
                door.enter(Socket::Tcp(stream), Owner::Remote).await;
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    sleep(PAUSE_AFTER_FAILURE).await;
}
