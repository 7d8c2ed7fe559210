//! Every bound of the injector, named.

use std::time::Duration;

/// Largest review that is read. The API server refuses objects over 3 MiB, and a review holds at most two.
pub const REVIEW_BYTES_MAX: usize = 8 << 20;
/// Connections from API servers and probes, per port.
pub const CONNECTIONS_MAX: usize = 256;
/// How long a TLS handshake may take.
pub const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection may be idle or take for a request's head.
pub const HEAD_WITHIN: Duration = Duration::from_secs(95);
/// How long reviews in work may go on at shutdown. The API server waits 5 s for each.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(6);
/// How long new reviews are taken at shutdown, because the Service's endpoints are updated late.
pub const DRAIN_GRACE: Duration = Duration::from_secs(3);
/// Pause after a failed accept.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often certificates are looked after.
pub const CERTIFICATES_EVERY: Duration = Duration::from_secs(3600);
/// How soon again after a failure.
pub const CERTIFICATES_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// How long one look may take.
pub const CERTIFICATES_WITHIN: Duration = Duration::from_secs(30);
/// Writers that may come between a reading and a writing of the Secret before the next look.
pub const CONFLICTS_MAX: u32 = 5;
/// Life of the authority that signs the webhook's certificates.
pub const AUTHORITY_LIFE: Duration = Duration::from_secs(360 * 24 * 3600);
/// A new authority is made when this much of the old one's life is left; until then both are trusted.
pub const AUTHORITY_RENEW_LEFT: Duration = Duration::from_secs(120 * 24 * 3600);
/// Life of the webhook's certificate.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(14 * 24 * 3600);
/// A new one is made when this much is left.
pub const CERTIFICATE_RENEW_LEFT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates are valid from so long ago, because clocks differ.
pub const CLOCKS_DIFFER_BY: Duration = Duration::from_secs(3600);
/// Mistakes that one refusal lists.
pub const MISTAKES_SHOWN_MAX: usize = 20;

const _: () =
    assert!(CERTIFICATE_LIFE.as_secs() < AUTHORITY_RENEW_LEFT.as_secs(), "no certificate outlives its signer");
const _: () = assert!(CERTIFICATES_EVERY.as_secs() < CERTIFICATE_RENEW_LEFT.as_secs(), "renewal is seen in time");
