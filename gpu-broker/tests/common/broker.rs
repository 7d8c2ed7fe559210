//! A broker process of one's own.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::wait_for;

pub fn library() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/ort/libonnxruntime.so.1.31.1");
    let path = std::env::var_os("ORT_DYLIB_PATH").map_or(default, PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `make fetch`", path.display());
    path
}

pub struct Broker {
    child: Child,
    pub dir: tempfile::TempDir,
    admin: u16,
    pub tcp: u16,
    /// How much of its log those before it have written.
    logged: usize,
    devices: String,
}

impl Broker {
    /// Starts a broker with these `[[device]]` tables and other settings in front of them; `{dir}` is its folder.
    pub fn start(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Self::spawn(dir.path(), settings);
        let mut broker = Self { child, dir, admin: 0, tcp: 0, logged: 0, devices: settings.to_owned() };
        broker.wait_until_ready();
        broker
    }

    /// What a broker says that cannot serve with these settings.
    pub fn refused(settings: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Self::spawn(dir.path(), settings);
        assert!(!child.wait().unwrap().success());
        fs::read_to_string(dir.path().join("broker.log")).unwrap()
    }

    /// The system chooses its ports: one that was looked for before could be another one's by now.
    fn spawn(dir: &Path, settings: &str) -> Child {
        let config = dir.join("faaswap.toml");
        let text = format!(
            "socket = \"{0}/broker.sock\"\nstore_dir = \"{0}/store\"\nmemory_dir = \"{0}/memory\"\n\
             onnxruntime = \"{1}\"\nadmin_listen = \"127.0.0.1:0\"\ntcp_listen = \"127.0.0.1:0\"\n\
             scratch_max = \"512MiB\"\n{settings}\n",
            dir.display(),
            library().display()
        );
        let text = text.replace("{dir}", &dir.display().to_string());
        // `make test` runs some of these programs twice: the second time with devices in processes of their own.
        let workers = std::env::var("FAASWAP_TEST_WORKERS").ok().filter(|_| !settings.contains("workers ="));
        let text = workers.map_or(text.clone(), |workers| format!("workers = \"{workers}\"\n{text}"));
        fs::write(&config, text).unwrap();
        let log = File::options().create(true).append(true).open(dir.join("broker.log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_faaswap-broker"))
            .args(["serve", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Kills it as `kill -9` does, and starts another in its place.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.logged = self.log().len();
        self.child = Self::spawn(self.dir.path(), &self.devices);
        self.wait_until_ready();
    }

    fn wait_until_ready(&mut self) {
        wait_for("the broker to be ready", || {
            assert!(self.is_alive(), "the broker has ended");
            let log = self.log();
            let ports = ["admin port", "TCP port"].map(|port| port_of(&log[self.logged..], port));
            let [Some(admin), Some(tcp)] = ports else { return false };
            (self.admin, self.tcp) = (admin, tcp);
            self.try_get("/readyz").is_some_and(|body| body == "ready\n")
        });
    }

    /// What it has logged, and those before it.
    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("broker.log")).unwrap_or_default()
    }

    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("broker.sock")
    }

    /// Asks the admin port; gives status and body.
    fn tell(&self, method: &str, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).ok()?;
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    fn try_get(&self, path: &str) -> Option<String> {
        self.tell("GET", path).filter(|(status, _)| *status == 200).map(|(_, body)| body)
    }

    pub fn post(&self, path: &str) -> (u16, String) {
        self.tell("POST", path).unwrap_or_else(|| panic!("no answer for {path}"))
    }

    pub fn get(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.try_get(path).unwrap_or_else(|| panic!("no answer for {path}"))).unwrap()
    }

    /// A metric's value, its labels as they are printed.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.try_get("/metrics").unwrap();
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or(0.0)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- broker's log\n{}", self.log());
        }
    }
}

/// The port of an address that was logged behind this.
fn port_of(log: &str, what: &str) -> Option<u16> {
    let line = log.lines().find(|line| line.contains(what))?;
    line.rsplit_once("address=127.0.0.1:")?.1.parse().ok()
}
