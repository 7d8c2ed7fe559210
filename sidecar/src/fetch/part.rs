//! A file that is being fetched: written and hashed on a thread of its own, so that a slow disk keeps no probe waiting.
//!
//! It has no name, so nothing is left of it when its process ends, however it ends.

use std::{
    fs::File,
    io::{self, Seek, Write},
    path::Path,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::limits::FETCH_PIECES_MAX;

enum Order {
    Piece(Bytes),
    Restart,
}

/// What came to its end.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) digest: [u8; 32],
}

/// The writing end.
pub(super) struct Part {
    orders: mpsc::Sender<Order>,
    writer: JoinHandle<io::Result<Written>>,
    len: u64,
}

impl Part {
    /// An empty file in this folder, which is made where it is missing.
    pub(super) fn new(folder: &Path) -> Self {
        let (orders, taken) = mpsc::channel(FETCH_PIECES_MAX);
        let folder = folder.to_owned();
        Self { orders, writer: tokio::task::spawn_blocking(move || write(&folder, taken)), len: 0 }
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends; says `false` when the disk has failed, which [`Part::finish`] then explains.
    pub(super) async fn push(&mut self, piece: Bytes) -> bool {
        self.len += faaswap_protocol::Bytes::of_len(piece.len()).get();
        self.orders.send(Order::Piece(piece)).await.is_ok()
    }

    /// Forgets what it has.
    pub(super) async fn restart(&mut self) {
        self.len = 0;
        // A disk that failed is explained at the end.
        let _gone = self.orders.send(Order::Restart).await;
    }

    /// Waits until all is written.
    pub(super) async fn finish(self) -> io::Result<Written> {
        drop(self.orders);
        self.writer.await.map_err(io::Error::other)?
    }
}

fn write(folder: &Path, mut orders: mpsc::Receiver<Order>) -> io::Result<Written> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::tempfile_in(folder)?;
    let mut hash = Sha256::new();
    let mut len = 0;
    while let Some(order) = orders.blocking_recv() {
        match order {
            Order::Piece(bytes) => {
                file.write_all(&bytes)?;
                hash.update(&bytes);
                len += faaswap_protocol::Bytes::of_len(bytes.len()).get();
            }
            Order::Restart => {
                file.set_len(0)?;
                file.rewind()?;
                hash = Sha256::new();
                len = 0;
            }
        }
    }
    Ok(Written { file, len, digest: hash.finalize().into() })
}
