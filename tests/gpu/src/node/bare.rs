//! The least that a request to a front and a broker costs on a machine: its bytes through a TCP connection, and a word to a second
//! thread and back, which sleeps as long as a broker takes. Nobody looks at the bytes, and what was slept does not count; but that
//! all others have slept meanwhile does, as with a request.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::Result;

/// A connection to a thread that takes requests and gives answers of fixed lengths, once another thread has said a word.
pub(super) struct Exchange {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
    /// Nanoseconds: that the second thread shall sleep, and then that it slept. The connections order these.
    sleep: Arc<AtomicU64>,
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
        let sleep = Arc::new(AtomicU64::new(0));
        let slept = Arc::clone(&sleep);
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
                let start = Instant::now();
                thread::sleep(Duration::from_nanos(slept.load(Ordering::Acquire)));
                slept.store(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
                told.write_all(&word)?;
            }
        })?;
        Ok(Self { stream, request: vec![1; request], answer: vec![0; answer], sleep })
    }

    /// One request and its answer, in milliseconds without those that the second thread slept, which shall be about so many.
    pub(super) fn once(&mut self, sleep: Duration) -> Result<f64> {
        self.sleep.store(u64::try_from(sleep.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
        let start = Instant::now();
        self.stream.write_all(&self.request)?;
        self.stream.read_exact(&mut self.answer)?;
        let slept = Duration::from_nanos(self.sleep.load(Ordering::Acquire));
        Ok(start.elapsed().saturating_sub(slept).as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_was_slept_is_known() {
        let mut exchange = Exchange::start(10, 10).unwrap();
        let (start, sleep) = (Instant::now(), Duration::from_millis(30));
        let took = exchange.once(sleep).unwrap();
        let whole = start.elapsed();
        let slept = Duration::from_nanos(exchange.sleep.load(Ordering::Acquire));
        assert!(slept >= sleep && slept <= whole, "{slept:?} of {whole:?}");
        assert!(took <= (whole - slept).as_secs_f64() * 1e3, "{took}");
    }

    #[test]
    fn every_request_has_an_answer_of_its_own() {
        let mut exchange = Exchange::start(700_000, 4_000).unwrap();
        for _ in 0..3 {
            exchange.answer.fill(0);
            exchange.once(Duration::ZERO).unwrap();
            assert_eq!(exchange.answer, vec![1; 4_000]);
        }
    }
}
