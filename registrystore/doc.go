// Package registrystore keeps chunks in an OCI registry, or in an OCI layout,
// and reads them from there one by one.
//
// A registry charges per request and forgets what no manifest names, so
// chunks do not travel alone. A [PackWriter] lines their zstd frames up in
// packs, blobs of some megabytes; a [DataManifest] lists the packs, so that
// they are copied, signed and collected together with the image; [Locators]
// say for each chunk of an index where in which pack its frame lies.
//
// To read, give [NewStore] the [Blobs] of a place and the locators: the
// [Store] asks for the bytes of single chunks by HTTP Range, or for runs of
// neighbours at once. It asks for blobs by digest only, never for a manifest.
//
// The place is trusted for nothing but its location. What it sends is bounded
// by what was asked for, and package chunkstore compares every chunk with its
// name before it is used. A failed read is never remembered; a [*chunkstore.Error] tells
// whether asking again can help, and when.
package registrystore
