//! A handler that costs next to nothing: it sends back the body that it was sent. Fronts are measured before it.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::{Result, Trouble};

/// Largest body that it sends back.
const BODY_BYTES_MAX: u64 = 64 << 20;

/// Serves until whoever started it ends.
pub fn serve(address: SocketAddr) -> Result<()> {
    // A front that is killed cannot end its handler, as the end of a container would.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| Trouble::new(error.to_string()))?;
    let listener = TcpListener::bind(address)?;
    loop {
        let (stream, _) = listener.accept()?;
        // A client that has enough closes.
        thread::spawn(move || drop(connection(&stream)));
    }
}

fn connection(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = (BufReader::new(stream), stream);
    let mut reply = Vec::new();
    while let Some(body) = request(&mut reader)? {
        reply.clear();
        write!(reply, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len())?;
        reply.extend_from_slice(&body);
        writer.write_all(&reply)?;
    }
    Ok(())
}

/// The body of the next request; `None` where there is none.
fn request(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<Vec<u8>>> {
    let (mut len, mut chunked, mut line) = (0, false, String::new());
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().to_ascii_lowercase().split_once(':') {
            Some(("content-length", value)) => len = number(value, 10)?,
            Some(("transfer-encoding", _)) => chunked = true,
            Some(_) => {}
            None => break,
        }
    }
    let mut body = Vec::new();
    if !chunked {
        piece(reader, len, &mut body)?;
        return Ok(Some(body));
    }
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let len = number(&line, 16)?;
        piece(reader, len, &mut body)?;
        line.clear();
        reader.read_line(&mut line)?;
        if len == 0 {
            return Ok(Some(body));
        }
    }
}

fn number(text: &str, radix: u32) -> io::Result<u64> {
    u64::from_str_radix(text.trim(), radix).map_err(io::Error::other)
}

fn piece(reader: &mut impl Read, len: u64, body: &mut Vec<u8>) -> io::Result<()> {
    let whole = body.len() as u64 + len;
    if whole > BODY_BYTES_MAX {
        return Err(io::Error::other("the body is too large"));
    }
    reader.take(len).read_to_end(body)?;
    if body.len() as u64 == whole { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
