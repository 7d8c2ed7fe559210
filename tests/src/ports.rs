//! Ports for programs that cannot be asked which one the system gave them. The sidecar's tests include this file, too.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::atomic::{AtomicU16, Ordering},
};

/// Ports below those that the system gives to outgoing connections.
const PORT_FIRST: u16 = 18_000;
const PORTS: u16 = 14_000;

/// A port on this machine that nobody listens on, and that no outgoing connection will take.
pub fn free_port() -> io::Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test programs run beside each other: each starts somewhere else.
    let start = u16::try_from(std::process::id().wrapping_mul(61) % u32::from(PORTS)).unwrap_or(0);
    for _ in 0..PORTS {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORT_FIRST + (start.wrapping_add(step)) % PORTS;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "every port is taken"))
}
