//! The bookstore as a program of its own; `flotilla sample bookstore` is the same.

use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    bookstore::run(bookstore::Args::parse()).await
}
