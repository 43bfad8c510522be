//! `flotilla token`: for clusters that join and workloads that ask for a certificate.

mod dial;

use std::net::SocketAddr;

use mesh_runtime::exit;
use multicluster::{admin_pb::CreateTokenRequest, authority_pb::IssueTokenRequest};

use crate::{
    local::{Local, refusal},
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, clap::Subcommand)]
enum TokenCommand {
    /// Create a join token for one cluster; it is shown once
    Create {
        #[command(flatten)]
        local: Local,
        /// Lifetime, such as 15m or 2h
        #[arg(long, default_value = "15m", value_parser = seconds)]
        ttl: u64,
        /// For a newcomer that cannot dial this cluster, and waits at this address (`flotilla join-cluster --accept`):
        /// prints the token, then dials until the newcomer has joined
        #[arg(long, value_name = "ADDRESS")]
        dial: Option<SocketAddr>,
        /// With --dial: where this cluster's control plane serves newcomers
        #[arg(long, value_name = "ADDRESS", requires = "dial", default_value = "127.0.0.1:15016")]
        control_plane: SocketAddr,
        /// For a newcomer that keeps its own root: its trust domain. Both meshes then accept each other's certificates,
        /// each by its own roots
        #[arg(long, value_name = "TRUST_DOMAIN")]
        federate: Option<String>,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Create a token with which a workload asks for its first certificate
    Workload {
        #[command(flatten)]
        local: Local,
        /// Namespace
        #[arg(long)]
        namespace: String,
        /// Service account
        #[arg(long)]
        service_account: String,
        /// Lifetime, such as 12h
        #[arg(long, default_value = "12h", value_parser = seconds)]
        ttl: u64,
    },
}

/// `90`, `90s`, `15m`, `2h`, `1d`.
fn seconds(s: &str) -> Result<u64, String> {
    let bad = || format!("{s:?} is not a time such as 90s, 15m, 2h or 1d");
    let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let n: u64 = digits.parse().map_err(|_| bad())?;
    let unit = match &s[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(bad()),
    };
    n.checked_mul(unit).filter(|n| *n > 0).ok_or_else(bad)
}

pub(crate) async fn run(args: TokenArgs) -> anyhow::Result<u8> {
    match args.command {
        TokenCommand::Create { local, ttl, dial, control_plane, federate, output } => {
            let request =
                CreateTokenRequest { ttl, dials: dial.is_some(), federate: federate.unwrap_or_default() };
            match local.admin().await?.create_token(request).await {
                Ok(r) => {
                    let r = r.into_inner();
                    match output {
                        Format::Json => {
                            output::json(&serde_json::json!({"token": r.token, "expires": r.expires}))?;
                        }
                        Format::Text => println!("{}", r.token),
                    }
                    match dial {
                        Some(to) => dial::until_joined(&local, to, control_plane, r.expires).await,
                        None => Ok(exit::OK),
                    }
                }
                Err(s) => {
                    eprintln!("error: no token: {}", refusal(&s));
                    Ok(exit::FAILED)
                }
            }
        }
        TokenCommand::Workload { local, namespace, service_account, ttl } => {
            let ttl = i64::try_from(ttl)?;
            let request = IssueTokenRequest { namespace, service_account, ttl };
            match local.authority().await?.issue_token(request).await {
                Ok(r) => {
                    println!("{}", r.into_inner().token);
                    Ok(exit::OK)
                }
                Err(s) => {
                    eprintln!("error: no token: {}", refusal(&s));
                    Ok(exit::FAILED)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn times() {
        for (s, n) in [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86_400)] {
            assert_eq!(seconds(s), Ok(n));
        }
        for bad in ["", "0", "m", "1w", "-1s", "1.5h", "99999999999999999999d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
