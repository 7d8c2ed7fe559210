//! Weights that another process fills: it tells how far it is.

use std::{os::fd::OwnedFd, sync::Arc};

use faaswap_protocol::Bytes;

use super::{HostWeights, Pages};
use crate::DeviceError;

/// Raises the mark of weights as another process says. Where it goes before all of them are there, the rest will not come.
#[derive(Debug)]
pub struct Follower(Arc<HostWeights>);

impl HostWeights {
    /// Maps a file that another process fills.
    pub fn to_follow(file: OwnedFd, size: Bytes) -> Result<(Arc<Self>, Follower), DeviceError> {
        let weights = Arc::new(Self::map(file, size, Pages::Later)?);
        Ok((Arc::clone(&weights), Follower(weights)))
    }
}

impl Follower {
    /// The bytes up to this one are there; false once all of them are.
    pub fn raise(&self, until: Bytes) -> bool {
        let len = self.0.len();
        let until = until.as_len().map_or(len, |until| until.min(len));
        self.0.level.raise(until);
        until < len
    }

    /// The rest will not come.
    pub fn fail(&self, why: DeviceError) {
        self.0.level.fail(why);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.0.filled() < self.0.len() {
            self.fail(DeviceError::Invalid("whoever fills the weights has gone"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::Duration;

    use super::*;

    #[test]
    fn weights_are_there_as_far_as_the_other_process_says() {
        let (theirs, _filler) = HostWeights::to_come(Bytes::new(9000)).unwrap();
        let file = || theirs.file().unwrap().try_clone_to_owned().unwrap();
        let (weights, follower) = HostWeights::to_follow(file(), Bytes::new(9000)).unwrap();
        assert_eq!(weights.wait_filled(1, Duration::ZERO), Ok(false));
        assert!(follower.raise(Bytes::new(5000)));
        assert_eq!(weights.filled(), 5000);
        assert!(!follower.raise(Bytes::new(u64::MAX)), "no more than there is");
        drop(follower);
        assert_eq!(weights.as_slice().len(), 9000);
        let (weights, follower) = HostWeights::to_follow(file(), Bytes::new(9000)).unwrap();
        follower.raise(Bytes::new(10));
        drop(follower);
        assert!(weights.wait_filled(11, Duration::from_secs(9)).is_err());
        assert_eq!(weights.wait_filled(10, Duration::ZERO), Ok(true));
    }
}
