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
    /// Where pods without slots may run, as key=value; slots place pods by themselves.
    #[arg(long, env = "INJECTOR_NODE_SELECTOR", value_parser = pair, default_value = "faaswap.dev/broker=true")]
    pub node_selector: (String, String),
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

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("'{text}' is not like key=value"))?;
    Ok((key.to_owned(), value.to_owned()))
}
