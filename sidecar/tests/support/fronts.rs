//! Fronts as programs with a handler behind each: ours, and the real of-watchdog where there is one.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    time::sleep,
};

use super::{
    broker::{FakeBroker, doubler},
    clients::Http,
    ports::free_port,
};

/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// Our front.
pub fn ours() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_faaswap-sidecar"))
}

/// Our front, and the real one where there is one: `FAASWAP_OF_WATCHDOG`, what `make fetch-go` installs, or on `PATH`.
pub fn fronts() -> Vec<PathBuf> {
    let given = std::env::var_os("FAASWAP_OF_WATCHDOG").map(PathBuf::from);
    if let Some(given) = &given {
        assert!(given.is_file(), "FAASWAP_OF_WATCHDOG: there is no {}", given.display());
    }
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/go/bin/of-watchdog");
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&folders).map(|folder| folder.join("of-watchdog"));
    match given.into_iter().chain([installed]).chain(on_path).find(|path| path.is_file()) {
        Some(theirs) => vec![ours(), theirs],
        None => {
            eprintln!("SKIPPED for of-watchdog: it is not there (FAASWAP_OF_WATCHDOG); our front alone is tested");
            vec![ours()]
        }
    }
}

/// A front that runs.
pub struct Running {
    child: Child,
    pub http: Http,
    pub front: SocketAddr,
    pub metrics: SocketAddr,
    pub handler: SocketAddr,
    folder: TempDir,
    _broker: FakeBroker,
}

impl Running {
    /// A front with its handler, both serving.
    pub async fn start(program: &Path, more: &[(&str, &str)]) -> Self {
        let mut running = Self::spawn(program, more).await;
        running.until(async |http| http.get("/up").await.status == 200).await;
        running
    }

    /// A front that may not serve yet.
    pub async fn spawn(program: &Path, more: &[(&str, &str)]) -> Self {
        Self::spawn_named(program, ["fprocess", "upstream_url"], more).await
    }

    /// The same, told the handler's command and address by variables of these names.
    pub async fn spawn_named(program: &Path, names: [&str; 2], more: &[(&str, &str)]) -> Self {
        let (front, handler, metrics) = (free_port().unwrap(), free_port().unwrap(), free_port().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let broker = FakeBroker::start(doubler());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/handler.py");
        let child = Command::new(program)
            .env_clear()
            .envs([("PATH", std::env::var("PATH").unwrap())])
            .env("TMPDIR", folder.path())
            .env("mode", "http")
            .env("port", front.port().to_string())
            .env(names[0], format!("python3 {} {}", script.display(), handler.port()))
            .env(names[1], format!("http://{handler}"))
            .env("exec_timeout", "20s")
            .env("write_timeout", "1s")
            .env("FAASWAP_BROKER_SOCKET", broker.socket())
            .env("FAASWAP_FUNCTION", super::NAME)
            .env("FAASWAP_MODEL", super::digest().to_string())
            .env("FAASWAP_LISTEN", "127.0.0.1:0")
            .env("FAASWAP_METRICS_LISTEN", metrics.to_string())
            .envs(more.iter().copied())
            .kill_on_drop(true)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, http: Http::new(front), front, metrics, handler, folder, _broker: broker }
    }

    /// Asks until it is so.
    pub async fn until(&mut self, so: impl AsyncFn(&Http) -> bool) {
        let waiting = async {
            loop {
                if TcpStream::connect(self.front).await.is_ok() && so(&self.http).await {
                    return;
                }
                assert_eq!(self.child.try_wait().unwrap(), None, "the front ended");
                sleep(POLL).await;
            }
        };
        tokio::time::timeout(SOON, waiting).await.expect("it becomes so");
    }

    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Makes the handler end with this code. Whether that is answered depends on who is quicker.
    pub async fn end_handler(&self, code: u8) {
        let mut stream = TcpStream::connect(self.front).await.unwrap();
        let request = format!("GET /exit/{code} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let _answer_or_reset = stream.read_to_end(&mut Vec::new()).await;
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        tokio::time::timeout(SOON, self.child.wait()).await.expect("it ends").unwrap().code()
    }

    pub fn lock(&self) -> PathBuf {
        self.folder.path().join(".lock")
    }
}
