//! The least that a request to a front and a broker costs on a machine: its bytes through a TCP connection, and a word to a second
//! thread and back. Nobody looks at the bytes.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::Instant,
};

use crate::Result;

/// A connection to a thread that takes requests and gives answers of fixed lengths, once another thread has said a word.
pub(super) struct Exchange {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Exchange {
    /// Its threads end with it.
    pub(super) fn start(request: usize, answer: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut front, _) = listener.accept()?;
        let (mut asked, mut told) = UnixStream::pair()?;
        stream.set_nodelay(true)?;
        front.set_nodelay(true)?;
        let (mut taken, given) = (vec![0; request], vec![1; answer]);
        // Both end where the other side has gone.
        thread::Builder::new().name("bare-front".to_owned()).spawn(move || -> io::Result<()> {
            loop {
                front.read_exact(&mut taken)?;
                asked.write_all(&[1])?;
                asked.read_exact(&mut [0])?;
                front.write_all(&given)?;
            }
        })?;
        thread::Builder::new().name("bare-broker".to_owned()).spawn(move || -> io::Result<()> {
            loop {
                let mut word = [0];
                told.read_exact(&mut word)?;
                told.write_all(&word)?;
            }
        })?;
        Ok(Self { stream, request: vec![1; request], answer: vec![0; answer] })
    }

    /// One request and its answer, in milliseconds.
    pub(super) fn once(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.stream.write_all(&self.request)?;
        self.stream.read_exact(&mut self.answer)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_request_has_an_answer_of_its_own() {
        let mut exchange = Exchange::start(700_000, 4_000).unwrap();
        for _ in 0..3 {
            exchange.answer.fill(0);
            exchange.once().unwrap();
            assert_eq!(exchange.answer, vec![1; 4_000]);
        }
    }
}
