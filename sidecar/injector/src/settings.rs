//! What an operator sets, by arguments or by `INJECTOR_` variables.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, ValueEnum};

use crate::wish::Transport;

/// Gives pods the sidecar that their annotations ask for.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Settings {
    /// Where the API server comes, over TLS.
    #[arg(long, env = "INJECTOR_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Probes and metrics.
    #[arg(long, env = "INJECTOR_METRICS_LISTEN", default_value = "0.0.0.0:9465")]
    pub metrics_listen: SocketAddr,
    /// The sidecar's image where a pod names none.
    #[arg(long, env = "INJECTOR_SIDECAR_IMAGE", default_value = "faaswap/sidecar:0.1.0")]
    pub sidecar_image: String,
    /// How pods reach the broker where they do not say it.
    #[arg(long, env = "INJECTOR_TRANSPORT", value_enum, default_value = "slot")]
    pub transport: Transport,
    /// Whether the cluster restarts init containers (Kubernetes 1.29 and later); else the sidecar is a container.
    #[arg(long, env = "INJECTOR_NATIVE_SIDECAR", default_value = "true", action = clap::ArgAction::Set)]
    pub native_sidecar: bool,
    /// What happens to a pod whose annotations are wrong.
    #[arg(long, env = "INJECTOR_ON_MISTAKE", value_enum, default_value = "deny")]
    pub on_mistake: OnMistake,
    /// Label of the nodes with a broker, as key=value, or off: there pods without slots go. Slots place pods by themselves.
    #[arg(long, env = "INJECTOR_NODE_SELECTOR", value_parser = selector, default_value = "nvidia.com/gpu.present=true")]
    pub node_selector: Selector,
    /// Folder with tls.crt and tls.key that somebody else renews; else the injector has its own authority.
    #[arg(long, env = "INJECTOR_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Namespace of the injector's Service and Secret.
    #[arg(long, env = "POD_NAMESPACE", default_value = "faaswap-system")]
    pub namespace: String,
    /// Name of the Service, in the certificate.
    #[arg(long, env = "INJECTOR_SERVICE", default_value = "faaswap-injector")]
    pub service: String,
    /// Name of the Secret with the authority.
    #[arg(long, env = "INJECTOR_SECRET", default_value = "faaswap-injector-authority")]
    pub secret: String,
    /// Name of the webhook configuration that must trust the authority.
    #[arg(long, env = "INJECTOR_WEBHOOK", default_value = "faaswap-sidecar-injector")]
    pub webhook: String,
    /// Which log lines are written.
    #[arg(long, env = "INJECTOR_LOG", default_value = "info")]
    pub log: String,
}

/// What happens to a pod whose annotations are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnMistake {
    /// It is refused, with the reason.
    Deny,
    /// It is made without a sidecar, with a warning: for rollouts that must not stop.
    Ignore,
}

/// A label of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Every node has a broker.
    Off,
    /// Those with this label have one.
    Label {
        /// Its key.
        key: String,
        /// Its value.
        value: String,
    },
}

fn selector(text: &str) -> Result<Selector, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(Selector::Label { key: key.to_owned(), value: value.to_owned() }),
        None if text == "off" => Ok(Selector::Off),
        Some(_) | None => Err(format!("'{text}' is neither key=value nor off")),
    }
}
