//! A model as it is made for this node's devices: GPUs compute fp32 products in TF32 or not, which gives two of one digest.
//!
//! Says which one a function has, and what it is prepared for. The choice ends up in the prepared model's manifest, where
//! `engine` finds it; host devices have none, and functions share their model whatever they say.

use faaswap_engine::{CudaTarget, Target};
use faaswap_protocol::{ModelDigest, Tf32};

use crate::store::flavour;

/// A model as it is prepared and bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    /// What was uploaded.
    pub(crate) digest: ModelDigest,
    /// Whether its fp32 products may be computed in TF32; `None` on devices that have no such choice.
    pub(crate) tf32: Option<bool>,
}

/// What models are prepared for: all devices of a node are of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    /// The processor.
    Host,
    /// GPUs.
    Gpu {
        /// The one that prepares, with the node's settings.
        cuda: CudaTarget,
        /// What they can do.
        capability: i32,
    },
}

impl Machine {
    /// The variant that a function has which says this.
    pub(crate) fn variant(self, digest: ModelDigest, wanted: Tf32) -> Variant {
        let tf32 = match (self, wanted) {
            (Self::Host, Tf32::Node | Tf32::On | Tf32::Off) => None,
            (Self::Gpu { cuda, .. }, Tf32::Node) => Some(cuda.tf32),
            (Self::Gpu { .. }, Tf32::On) => Some(true),
            (Self::Gpu { .. }, Tf32::Off) => Some(false),
        };
        Variant { digest, tf32 }
    }

    /// What that variant is prepared for.
    pub(crate) fn target(self, variant: &Variant) -> Target {
        match self {
            Self::Host => Target::Cpu,
            Self::Gpu { cuda, .. } => Target::Cuda(CudaTarget { tf32: variant.tf32.unwrap_or(cuda.tf32), ..cuda }),
        }
    }

    /// How the store names what was prepared for the same.
    pub(crate) fn flavour(self, variant: &Variant) -> String {
        match self {
            Self::Host => flavour(None),
            Self::Gpu { cuda, capability } => flavour(Some((capability, variant.tf32.unwrap_or(cuda.tf32)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use faaswap_protocol::Bytes;

    use super::*;
    use crate::store::Store;

    const DIGEST: ModelDigest = ModelDigest([7; 32]);
    const ALL: [Tf32; 3] = [Tf32::Node, Tf32::On, Tf32::Off];

    fn gpu(tf32: bool) -> Machine {
        Machine::Gpu { cuda: CudaTarget { tf32, ..CudaTarget::new(0) }, capability: 90 }
    }

    #[test]
    fn on_gpus_a_function_that_says_something_else_than_the_node_has_a_model_of_its_own() {
        for node in [true, false] {
            let [usual, on, off] = ALL.map(|wanted| gpu(node).variant(DIGEST, wanted));
            assert_ne!(on, off);
            assert_eq!(usual, if node { on } else { off });
        }
    }

    #[test]
    fn variants_are_prepared_differently_and_kept_apart() {
        let dir = tempfile::tempdir().expect("folder");
        let store = Store::open(dir.path(), Bytes::mib(1)).expect("store");
        let [on, off] = [Tf32::On, Tf32::Off].map(|wanted| gpu(true).variant(DIGEST, wanted));
        let stores = [on, off].map(|variant| store.clone().with_flavour(gpu(true).flavour(&variant)));
        assert_ne!(stores[0].prepared_dir(&DIGEST), stores[1].prepared_dir(&DIGEST));
        assert_ne!(stores[0].kin_dir(), stores[1].kin_dir());
        assert_eq!(stores[0].model_dir(&DIGEST), stores[1].model_dir(&DIGEST), "what was uploaded is shared");
        for (variant, tf32) in [(on, true), (off, false)] {
            assert_eq!(gpu(true).target(&variant), Target::Cuda(CudaTarget { tf32, ..CudaTarget::new(0) }));
            let others = gpu(false);
            assert_eq!(others.flavour(&variant), gpu(true).flavour(&variant), "whatever the node's setting");
        }
    }

    #[test]
    fn on_host_devices_all_functions_share_one_model() {
        let variants = ALL.map(|wanted| Machine::Host.variant(DIGEST, wanted));
        assert!(variants.iter().all(|variant| *variant == variants[0]));
        assert_eq!(Machine::Host.target(&variants[2]), Target::Cpu);
        assert_eq!(Machine::Host.flavour(&variants[2]), flavour(None));
    }
}
