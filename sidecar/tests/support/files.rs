//! A file server that does what a test says, request by request, down to connections that break.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

/// What a client asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub path: String,
    headers: Vec<(String, String)>,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }
}

/// What it is answered: bytes, then the end of the connection, or silence.
#[derive(Clone, Debug)]
pub struct Answer {
    bytes: Vec<u8>,
    hangs: bool,
}

impl Answer {
    /// A head with these lines, then the body.
    pub fn new(status: &str, lines: &[String], body: &[u8]) -> Self {
        let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        let mut bytes = format!("HTTP/1.1 {status}\r\n{lines}\r\n").into_bytes();
        bytes.extend_from_slice(body);
        Self { bytes, hangs: false }
    }

    /// A whole file.
    pub fn whole(tag: &str, body: &[u8]) -> Self {
        Self::new("200 OK", &[format!("ETag: {tag}"), format!("Content-Length: {}", body.len())], body)
    }

    /// A file from a byte on.
    pub fn rest(tag: &str, body: &[u8], from: usize) -> Self {
        let range = format!("Content-Range: bytes {from}-{}/{}", body.len() - 1, body.len());
        let length = format!("Content-Length: {}", body.len() - from);
        Self::new("206 Partial Content", &[format!("ETag: {tag}"), range, length], &body[from..])
    }

    pub fn redirect(to: &str) -> Self {
        Self::new("302 Found", &[format!("Location: {to}"), "Content-Length: 0".to_owned()], b"")
    }

    pub fn status(status: &str) -> Self {
        Self::new(status, &["Content-Length: 0".to_owned()], b"")
    }

    /// All but the last `lost` bytes, then the connection breaks.
    pub fn cut(mut self, lost: usize) -> Self {
        self.bytes.truncate(self.bytes.len() - lost);
        self
    }

    /// The connection stays open and nothing more comes.
    pub fn hanging(mut self) -> Self {
        self.hangs = true;
        self
    }
}

type Script = Arc<dyn Fn(usize, &Asked) -> Answer + Send + Sync>;

/// The server; dropped, it is gone.
pub struct Files {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Files {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Files {
    /// Answers each request as the script says, which hears how many came before.
    pub async fn start(script: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static) -> Self {
        Self::serve(None, script).await
    }

    /// The same over TLS.
    pub async fn serve(
        tls: Option<tokio_rustls::TlsAcceptor>,
        script: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (script, noted): (Script, _) = (Arc::new(script), Arc::clone(&asked));
        let serving = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (script, noted, tls) = (Arc::clone(&script), Arc::clone(&noted), tls.clone());
                open.spawn(async move {
                    match tls {
                        None => answer(stream, &script, &noted).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => answer(stream, &script, &noted).await,
                            Err(error) => eprintln!("{error}"),
                        },
                    }
                });
            }
        });
        Self { address, asked, serving }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All that was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, script: &Script, noted: &Mutex<Vec<Asked>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned())).collect();
    let asked = Asked { path, headers };
    let before = {
        let mut noted = noted.lock().unwrap();
        noted.push(asked.clone());
        noted.len() - 1
    };
    let Answer { bytes, hangs } = script(before, &asked);
    // A client that has enough closes first.
    let _closed = stream.write_all(&bytes).await;
    let _closed = stream.flush().await;
    if hangs {
        std::future::pending::<()>().await;
    }
    let _closed = stream.shutdown().await;
}
