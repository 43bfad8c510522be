//! Hot restart of a proxy: see [`mesh_runtime::handover`] for what passes between the two processes.
//!
//! A successor gets the sockets, then its configuration, resolves names and checks hosts, and only then accepts; the
//! predecessor tells its clients to leave (`connection: close`, GOAWAY) and ends with its last connection, or when the
//! time for that is over.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use axum::Router;
use clap::Args;
use mesh_proxy::Engine;
use mesh_runtime::{
    admin::serve_on,
    handover::{Leave, Predecessor, Socket, Successors},
    ready::Readiness,
};
use mesh_xds::process::ProcessSettings;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

/// Role of the sockets of listeners that are configured.
const LISTENER: &str = "listener";
/// Names and hosts that are not known after this time are no reason to go on waiting.
const WARM: Duration = Duration::from_secs(30);

/// Flags for replacing a running process. They have Envoy's names.
#[derive(Debug, Clone, Default, Args)]
pub struct RestartArgs {
    /// Replace the process that was started with the same number, by the same user in the same network namespace, without
    /// losing a connection, and be replaced in the same way; if none runs, just start. Without this flag (or
    /// --restart-epoch) a process neither replaces nor is replaced
    #[arg(long)]
    pub base_id: Option<u32>,
    /// Insist: 0 is to be the first process, any other number is to replace one
    #[arg(long)]
    pub restart_epoch: Option<u32>,
    /// How long connections may finish when another process has taken over, seconds [default: the mesh's `drainDuration`, or
    /// 600]
    #[arg(long)]
    pub drain_time_s: Option<u64>,
    /// When the process that is replaced must be gone, seconds [default: the mesh's `parentShutdownDuration`, or 900]
    #[arg(long)]
    pub parent_shutdown_time_s: Option<u64>,
}

impl RestartArgs {
    /// Whether the process can be replaced.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.base_id.is_some() || self.restart_epoch.is_some()
    }
}

/// A process's place in a chain of restarts.
#[derive(Debug, Default)]
pub struct Restart {
    predecessor: Option<Predecessor>,
    successors: Option<Successors>,
    /// Sockets of the predecessor that nobody has taken.
    inherited: Mutex<Vec<Socket>>,
    /// Duplicates of sockets that are not the engine's, for a successor.
    own: Mutex<Vec<Socket>>,
    flags: RestartArgs,
}

/// Pages that are served once this process is the one that serves.
pub(crate) type Pages = Vec<(tokio::net::TcpListener, Router)>;

impl Restart {
    /// Finds the process to replace, if there is one, and gets its sockets.
    ///
    /// # Errors
    /// It cannot be replaced, or is not as `--restart-epoch` says.
    pub async fn begin(args: &RestartArgs) -> anyhow::Result<Self> {
        if !args.is_on() {
            return Ok(Self::default());
        }
        let id = args.base_id.unwrap_or(0);
        let asked = tokio::task::spawn_blocking(move || Predecessor::ask(id)).await?;
        let found = asked.with_context(|| format!("hot restart with --base-id {id}"))?;
        match args.restart_epoch {
            Some(0) => ensure!(
                found.is_none(),
                "--restart-epoch 0 is for the first process, and one runs with --base-id {id}: use \
                 --restart-epoch {} or leave the flag out",
                found.as_ref().map_or(0, |f| f.0.epoch + 1)
            ),
            Some(n) => {
                ensure!(found.is_some(), "--restart-epoch {n}: no process runs with --base-id {id}")
            }
            None => {}
        }
        let (predecessor, mut sockets) = match found {
            Some((p, s)) => (Some(p), s),
            None => (None, vec![]),
        };
        let epoch =
            args.restart_epoch.or(predecessor.as_ref().map(|p| p.epoch.saturating_add(1))).unwrap_or(0);
        let successors = Successors::listen(id, epoch, &mut sockets)?;
        if predecessor.is_some() {
            tracing::info!(base_id = id, epoch, sockets = sockets.len(), "taking over");
        }
        Ok(Self {
            predecessor,
            successors: Some(successors),
            inherited: sockets.into(),
            own: Mutex::default(),
            flags: args.clone(),
        })
    }

    fn take<S: From<std::os::fd::OwnedFd>>(
        &self,
        role: &str,
        is: impl Fn(&S) -> bool,
    ) -> std::io::Result<Option<S>> {
        let mut all = self.inherited.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = None;
        for s in std::mem::take(&mut *all) {
            if s.role != role || found.is_some() {
                all.push(s);
                continue;
            }
            // One for another address is closed: nobody else wants this role.
            found = Some(S::from(s.fd)).filter(&is);
        }
        Ok(found)
    }

    fn keep(&self, role: &str, fd: std::io::Result<std::os::fd::OwnedFd>) -> std::io::Result<()> {
        if self.successors.is_some() {
            let socket = Socket { role: role.to_owned(), fd: fd? };
            self.own.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        }
        Ok(())
    }

    /// A TCP socket that listens at `address`, the predecessor's if it has one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn tcp(&self, role: &str, address: SocketAddr) -> std::io::Result<tokio::net::TcpListener> {
        let l = match self.take(role, |l: &TcpListener| l.local_addr().is_ok_and(|a| a == address))? {
            Some(l) => l,
            None => {
                let l = TcpListener::bind(address)?;
                l.set_nonblocking(true)?;
                l
            }
        };
        self.keep(role, l.try_clone().map(Into::into))?;
        tokio::net::TcpListener::from_std(l)
    }

    /// The same for UDP.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn udp(&self, role: &str, address: SocketAddr) -> std::io::Result<tokio::net::UdpSocket> {
        let s = match self.take(role, |s: &UdpSocket| s.local_addr().is_ok_and(|a| a == address))? {
            Some(s) => s,
            None => {
                let s = UdpSocket::bind(address)?;
                s.set_nonblocking(true)?;
                s
            }
        };
        self.keep(role, s.try_clone().map(Into::into))?;
        tokio::net::UdpSocket::from_std(s)
    }

    /// Whether there is a process to replace.
    #[must_use]
    pub fn takes_over(&self) -> bool {
        self.predecessor.is_some()
    }

    /// Gives the engine what its listeners had in the predecessor.
    pub(crate) fn equip(&self, engine: &Engine) {
        if self.predecessor.is_some() {
            let mut all = self.inherited.lock().unwrap_or_else(PoisonError::into_inner);
            let (mine, others) = std::mem::take(&mut *all).into_iter().partition(|s| s.role == LISTENER);
            *all = others;
            let mine: Vec<Socket> = mine;
            engine.inherit(mine.into_iter().map(|s| s.fd.into()).collect());
        }
    }

    /// Serves: at once, or as soon as this process can take over. What comes out of the channel ends it: a successor
    /// serves, and nothing is accepted here any more. Times are those of the moment.
    pub(crate) fn serve(
        self,
        engine: Arc<Engine>,
        readiness: Readiness,
        pages: Pages,
        settings: watch::Receiver<ProcessSettings>,
    ) -> (JoinHandle<()>, oneshot::Receiver<(Leave, Duration)>) {
        let (to, left) = oneshot::channel();
        let task = tokio::spawn(async move {
            if let Some(p) = self.predecessor {
                readiness.ready().await;
                engine.warmed(WARM).await;
                engine.accept();
                let limit = self.flags.handover(&settings.borrow()).limit;
                match tokio::task::spawn_blocking(move || p.replace(limit)).await {
                    Ok(Ok(())) => tracing::info!("took over"),
                    Ok(Err(error)) => tracing::warn!(%error, "the process that was replaced did not confirm"),
                    Err(error) => tracing::error!(%error, "handover"),
                }
            }
            // What an earlier configuration had is of no use here.
            self.inherited.lock().unwrap_or_else(PoisonError::into_inner).clear();
            let mut servers = tokio::task::JoinSet::new();
            for (listener, router) in pages {
                servers.spawn(async move {
                    match serve_on(listener, router) {
                        Ok((_, task)) => {
                            let mut task = AbortOnDrop(task);
                            // It ends when it fails, which it has said.
                            let _ = (&mut task.0).await;
                        }
                        Err(error) => tracing::error!(%error, "admin pages"),
                    }
                });
            }
            let Some(successors) = self.successors else {
                std::future::pending::<()>().await;
                return;
            };
            let own = self.own;
            let (tx, rx) = oneshot::channel();
            // A thread of its own: it waits for ever, and the runtime waits for those of its own pool when it ends.
            let waiting = std::thread::Builder::new().name("hot-restart".into()).spawn(move || {
                let sockets = || duplicates(&engine, &own).map_err(|e| e.to_string());
                match successors.wait(&sockets) {
                    Ok(leave) => {
                        engine.leave();
                        let _ = tx.send(leave);
                    }
                    Err(error) => tracing::error!(%error, "this process cannot be replaced"),
                }
            });
            if let Err(error) = waiting {
                tracing::error!(%error, "this process cannot be replaced");
            }
            match rx.await {
                Ok(leave) => {
                    servers.shutdown().await;
                    let limit = self.flags.handover(&settings.borrow()).drain.min(leave.limit);
                    let _ = to.send((leave, limit));
                }
                Err(_) => std::future::pending().await,
            }
        });
        (task, left)
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn duplicates(engine: &Engine, own: &Mutex<Vec<Socket>>) -> std::io::Result<Vec<Socket>> {
    let mut out = Vec::new();
    for l in engine.sockets()? {
        out.push(Socket { role: LISTENER.to_owned(), fd: l.into() });
    }
    for s in own.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        out.push(Socket { role: s.role.clone(), fd: s.fd.try_clone()? });
    }
    Ok(out)
}

/// Runs until `stop` or until another process has taken over, then lets connections finish.
pub(crate) async fn until_the_end(
    engine: &Engine,
    left: oneshot::Receiver<(Leave, Duration)>,
    replaced: &AtomicBool,
    stop: tokio_util::sync::CancellationToken,
    drain: impl Fn() -> Duration,
) {
    let leave = async {
        match left.await {
            Ok(leave) => leave,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        (leave, limit) = leave => {
            replaced.store(true, Relaxed);
            leave.confirm();
            tracing::info!(seconds = limit.as_secs(), "replaced: connections may finish");
            tokio::select! {
                () = engine.drain(limit) => return,
                () = stop.cancelled() => {}
            }
        }
    }
    let drain = drain();
    tracing::info!(seconds = drain.as_secs_f64(), "draining");
    engine.drain(drain).await;
}
