//! A small blocking HTTP/1.1 client that keeps its connection: what it measures is the server, not itself.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::{Result, Trouble};

/// How long a connection may take to open.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Longest head of a reply.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Longest body of a reply.
const BODY_BYTES_MAX: usize = 1 << 30;
/// Bytes asked of the socket at a time.
const READ_BYTES: usize = 64 << 10;

/// A reply.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status code.
    pub status: u16,
    head: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Reply {
    /// A reply that did not come from anywhere; header names in lower case.
    pub fn new(status: u16, head: &[(&str, String)], body: &[u8]) -> Self {
        let head = head.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        Self { status, head, body: body.to_vec() }
    }

    /// A header's value; names in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as text, for messages.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

/// A client of one server.
#[derive(Debug)]
pub struct Client {
    server: SocketAddr,
    patience: Duration,
    stream: Option<TcpStream>,
    spare: Vec<u8>,
}

impl Client {
    /// A client that waits so long for a reply. Nothing is connected yet.
    pub fn new(server: SocketAddr, patience: Duration) -> Self {
        Self { server, patience, stream: None, spare: Vec::new() }
    }

    /// Asks for a page.
    pub fn get(&mut self, path: &str) -> Result<Reply> {
        self.ask("GET", path, &[], &[])
    }

    /// Sends pieces that make up one body. A kept connection that the server has closed meanwhile is opened anew once.
    pub fn post(&mut self, path: &str, headers: &[(&str, String)], body: &[&[u8]]) -> Result<Reply> {
        self.ask("POST", path, headers, body)
    }

    fn ask(&mut self, verb: &str, path: &str, headers: &[(&str, String)], body: &[&[u8]]) -> Result<Reply> {
        let len: usize = body.iter().map(|piece| piece.len()).sum();
        let mut head = format!("{verb} {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: {len}\r\n", self.server);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let kept = self.stream.is_some();
        let reply = match self.exchange(head.as_bytes(), body) {
            // Closed while it was idle: nothing of the request was taken.
            Err(error) if kept && error.kind() != io::ErrorKind::WouldBlock && self.spare.is_empty() => {
                self.stream = None;
                self.exchange(head.as_bytes(), body)
            }
            other => other,
        };
        reply.map_err(|error| {
            self.stream = None;
            self.spare.clear();
            Trouble::new(format!("{verb} {path} at {}: {error}", self.server))
        })
    }

    fn exchange(&mut self, head: &[u8], body: &[&[u8]]) -> io::Result<Reply> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        self.spare.clear();
        write_pieces(&mut stream, head, body)?;
        let (reply, keep) = self.read_reply(&mut stream)?;
        if keep {
            self.stream = Some(stream);
        }
        Ok(reply)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.server, CONNECT_WITHIN)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.patience))?;
        stream.set_write_timeout(Some(self.patience))?;
        Ok(stream)
    }

    fn read_reply(&mut self, stream: &mut TcpStream) -> io::Result<(Reply, bool)> {
        let bytes = &mut self.spare;
        let head_len = loop {
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if bytes.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("the reply's head is too long"));
            }
            if read_some(stream, bytes)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let (status, head) = parse_head(&bytes[..head_len])?;
        let value = |name: &str| head.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let len =
            value("content-length").and_then(|len| len.parse::<usize>().ok()).filter(|len| *len <= BODY_BYTES_MAX);
        let len = len.ok_or_else(|| io::Error::other("the reply does not tell its length"))?;
        let keep = value("connection") != Some("close");
        let mut body = bytes.split_off(head_len);
        bytes.clear();
        if body.len() > len {
            return Err(io::Error::other("the reply is longer than it says"));
        }
        let have = body.len();
        body.resize(len, 0);
        stream.read_exact(&mut body[have..])?;
        Ok((Reply { status, head, body }, keep))
    }
}

fn write_pieces(stream: &mut TcpStream, head: &[u8], body: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<io::IoSlice<'_>> =
        std::iter::once(head).chain(body.iter().copied()).map(io::IoSlice::new).collect();
    let mut left = &mut slices[..];
    while !left.is_empty() {
        let written = stream.write_vectored(left)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        io::IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}

fn read_some(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let have = bytes.len();
    bytes.resize(have + READ_BYTES, 0);
    let read = stream.read(&mut bytes[have..]);
    bytes.truncate(have + *read.as_ref().unwrap_or(&0));
    read
}

fn parse_head(head: &[u8]) -> io::Result<(u16, Vec<(String, String)>)> {
    let bad = || io::Error::other("the reply's head is no HTTP/1.1");
    let text = std::str::from_utf8(head).map_err(|_| bad())?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|rest| rest.get(..3));
    let status = status.and_then(|code| code.parse().ok()).ok_or_else(bad)?;
    let fields = lines.filter(|line| !line.is_empty()).map(|line| {
        let (name, value) = line.split_once(':').ok_or_else(bad)?;
        Ok((name.to_ascii_lowercase(), value.trim().to_owned()))
    });
    Ok((status, fields.collect::<io::Result<_>>()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// A server that answers each connection with the given bytes, once the request's head has come.
    fn server(replies: Vec<&'static str>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for reply in replies {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = Vec::new();
                while !bytes.ends_with(b"\r\n\r\n") {
                    assert_ne!(read_some(&mut stream, &mut bytes).unwrap(), 0);
                }
                stream.write_all(reply.as_bytes()).unwrap();
            }
        });
        address
    }

    #[test]
    fn a_kept_connection_that_was_closed_is_opened_anew() {
        let reply = "HTTP/1.1 200 OK\r\nX-Thing: a\r\ncontent-length: 2\r\n\r\nhi";
        let mut client = Client::new(server(vec![reply, reply]), Duration::from_secs(30));
        for _ in 0..2 {
            let reply = client.get("/").unwrap();
            assert_eq!((reply.status, reply.header("x-thing"), &*reply.body), (200, Some("a"), &b"hi"[..]));
        }
    }

    #[test]
    fn half_a_reply_is_an_error() {
        for half in ["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", "HTTP/1.1 200 O", "HTTP/1.1 200 OK\r\n\r\n", ""]
        {
            let mut client = Client::new(server(vec![half]), Duration::from_secs(30));
            assert!(client.get("/").is_err(), "{half:?}");
        }
    }
}
