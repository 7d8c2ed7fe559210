//! Where a GPU sits on its PCI bus: the name by which two libraries mean the same GPU.
//!
//! Indices do not do: the driver sorts GPUs by speed and hides those that `CUDA_VISIBLE_DEVICES` leaves out, NVML sorts
//! them by address and hides none.

use std::{fmt, str::FromStr};

use crate::DeviceError;

/// A GPU's address. Its function is left out: a GPU is always function 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Which tree of buses.
    pub domain: u32,
    /// Which bus in it.
    pub bus: u32,
    /// Which place on it.
    pub device: u32,
}

/// Reads `domain:bus:device.function` in hexadecimal digits, however many of them.
impl FromStr for PciAddress {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let hex = |part: &str| {
            let all = !part.is_empty() && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            u32::from_str_radix(part, 16).ok().filter(|_| all)
        };
        let parts: Vec<&str> = text.trim().split(':').collect();
        let address = match parts[..] {
            [domain, bus, place] => {
                let (device, function) = place.split_once('.').unwrap_or((place, "0"));
                hex(function)
                    .and(Some(()))
                    .and_then(|()| Some(Self { domain: hex(domain)?, bus: hex(bus)?, device: hex(device)? }))
            }
            _ => None,
        };
        address.ok_or_else(|| DeviceError::Failed {
            call: "reading a PCI address",
            reason: format!("{text:?} is not domain:bus:device.function"),
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_libraries_ways_of_writing_an_address_mean_the_same_gpu() {
        let ours = PciAddress { domain: 0, bus: 0xab, device: 0x1 };
        for text in ["0000:AB:01.0", "00000000:ab:01.0", "0:ab:1", " 0000:ab:01.0\n"] {
            assert_eq!(text.parse(), Ok(ours), "{text:?}");
        }
        assert_eq!(ours.to_string(), "0000:ab:01.0");
        let wide = PciAddress { domain: 0x0001_0000, bus: 1, device: 0 };
        assert_eq!(wide.to_string().parse(), Ok(wide), "a domain of more than four digits");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "ab:01.0", "0:0:0:0", "0000:xy:01.0", "0000:+b:01.0", "0000:ab:", "0000:ab:01.x", "123456789:00:00.0"]
        {
            assert!(text.parse::<PciAddress>().is_err(), "{text:?}");
        }
    }
}
