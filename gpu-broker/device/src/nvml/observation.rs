//! What is seen of a GPU at one moment, as plain values.
//!
//! A value that this GPU, driver or container does not tell is absent; 0 always means 0.

use faaswap_protocol::Bytes;

use crate::PciAddress;

/// One GPU at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Which GPU.
    pub pci: PciAddress,
    /// Its name for life.
    pub uuid: Option<String>,
    /// Whether it has fallen off the bus.
    pub lost: bool,
    /// Its memory, by everyone's use.
    pub memory: Option<MemoryUse>,
    /// Share of the last moments in which it did something.
    pub busy: Option<Busy>,
    /// Its link to the host.
    pub pcie: Pcie,
    /// Clock of the multiprocessors, in MHz.
    pub sm_clock_mhz: Option<Level>,
    /// Clock of the memory, in MHz.
    pub memory_clock_mhz: Option<Level>,
    /// Why it is not faster.
    pub throttled: Option<Throttles>,
    /// Memory errors that were not corrected, since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// Faults since the watch began.
    pub xids: Option<Xids>,
    /// What others do on it.
    pub foreign: Option<Foreign>,
    /// Temperature of the chip.
    pub temperature_celsius: Option<u32>,
    /// Electrical power.
    pub power_milliwatts: Option<u32>,
}

impl Observation {
    /// A GPU of which nothing is known but where it is.
    pub fn blank(pci: PciAddress) -> Self {
        Self {
            pci,
            uuid: None,
            lost: false,
            memory: None,
            busy: None,
            pcie: Pcie::default(),
            sm_clock_mhz: None,
            memory_clock_mhz: None,
            throttled: None,
            ecc_uncorrected: None,
            xids: None,
            foreign: None,
            temperature_celsius: None,
            power_milliwatts: None,
        }
    }
}

/// Memory of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// In all.
    pub total: Bytes,
    /// Taken by anyone.
    pub used: Bytes,
    /// Not taken.
    pub free: Bytes,
}

/// Percent of the driver's last sampling period, which is between a sixth of a second and a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// In which at least one kernel ran.
    pub gpu_percent: u32,
    /// In which device memory was read or written.
    pub memory_percent: u32,
}

/// A value now, and the largest that it can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Now.
    pub now: u32,
    /// At most.
    pub max: u32,
}

/// A GPU's link to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pcie {
    /// From the GPU, over the last 20 ms.
    pub sent_per_second: Option<Bytes>,
    /// To the GPU, over the last 20 ms.
    pub received_per_second: Option<Bytes>,
    /// Generation; it falls while the link is idle.
    pub generation: Option<Level>,
    /// Lanes.
    pub width: Option<Level>,
}

/// Faults that the driver has reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Xids {
    /// How many.
    pub count: u64,
    /// The number of the last one, where there was one and it is known.
    pub last: Option<u64>,
}

/// Processes other than this one and its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// How many.
    pub processes: usize,
    /// Their memory, where the driver tells.
    pub bytes: Option<Bytes>,
    /// Whether this process was found too. Where not, numbers of processes mean something else to the driver than here
    /// (a container), and our own processes count as foreign.
    pub found_ours: bool,
}

/// Why a GPU does not run at its highest clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Throttle {
    /// Nothing runs.
    Idle,
    /// The clocks were set by an operator.
    ClocksSetting,
    /// The limit on power.
    PowerCap,
    /// The hardware halves clocks, at least: heat, power, or an external brake.
    HardwareSlowdown,
    /// Another GPU of its group is slower.
    SyncBoost,
    /// Too warm, the driver says.
    SoftwareThermal,
    /// Too hot, the hardware says.
    HardwareThermal,
    /// The power supply asks for less.
    PowerBrake,
    /// The clock of a display.
    DisplayClock,
}

impl Throttle {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Idle,
        Self::ClocksSetting,
        Self::PowerCap,
        Self::HardwareSlowdown,
        Self::SyncBoost,
        Self::SoftwareThermal,
        Self::HardwareThermal,
        Self::PowerBrake,
        Self::DisplayClock,
    ];

    /// For metrics and lists.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::ClocksSetting => "clocks_setting",
            Self::PowerCap => "power_cap",
            Self::HardwareSlowdown => "hardware_slowdown",
            Self::SyncBoost => "sync_boost",
            Self::SoftwareThermal => "software_thermal",
            Self::HardwareThermal => "hardware_thermal",
            Self::PowerBrake => "power_brake",
            Self::DisplayClock => "display_clock",
        }
    }

    /// Its bit as NVML numbers them (`nvmlClocksEventReason…` in `nvml.h`).
    const fn bit(self) -> u64 {
        match self {
            Self::Idle => 0x1,
            Self::ClocksSetting => 0x2,
            Self::PowerCap => 0x4,
            Self::HardwareSlowdown => 0x8,
            Self::SyncBoost => 0x10,
            Self::SoftwareThermal => 0x20,
            Self::HardwareThermal => 0x40,
            Self::PowerBrake => 0x80,
            Self::DisplayClock => 0x100,
        }
    }
}

/// A set of reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttles(u64);

impl Throttles {
    /// The reasons whose bits are set; bits of reasons that we do not know are left out.
    pub fn of_bits(bits: u64) -> Self {
        Self(Throttle::ALL.into_iter().map(|reason| reason.bit() & bits).sum())
    }

    /// Whether this is one of the reasons.
    pub fn contains(self, reason: Throttle) -> bool {
        self.0 & reason.bit() != 0
    }

    /// The reasons.
    pub fn iter(self) -> impl Iterator<Item = Throttle> {
        Throttle::ALL.into_iter().filter(move |reason| self.contains(*reason))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_reason_has_a_bit_and_a_name_of_its_own_and_comes_back() {
        let all = Throttles::of_bits(u64::MAX);
        assert_eq!(all.iter().collect::<Vec<_>>(), Throttle::ALL);
        assert_eq!(
            Throttle::ALL.iter().map(|reason| reason.code()).collect::<BTreeSet<_>>().len(),
            Throttle::ALL.len()
        );
        for reason in Throttle::ALL {
            assert_eq!(Throttles::of_bits(reason.bit()).iter().collect::<Vec<_>>(), [reason]);
        }
        assert_eq!(Throttles::of_bits(1 << 40), Throttles::default(), "a reason of a later driver");
    }
}
