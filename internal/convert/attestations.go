package convert

import (
	"context"
	"fmt"
	"maps"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/transport"
)

// Attestations says what becomes of what signs or describes the source:
// attestation manifests of its index, cosign's tags and OCI referrers.
type Attestations string

// The ways to treat them.
const (
	// Carry takes them to the destination: attestation manifests into its
	// index, beside the boot image; signatures under the names and digests of
	// the source, which is what they sign.
	Carry Attestations = "carry"
	// Refuse ends the conversion if there are any.
	Refuse Attestations = "refuse"
	// Drop leaves them out and says so.
	Drop Attestations = "drop"
)

// ParseAttestations reads the name of one of the ways.
func ParseAttestations(s string) (Attestations, error) {
	if a := Attestations(s); slices.Contains([]Attestations{Carry, Refuse, Drop}, a) {
		return a, nil
	}
	return "", fmt.Errorf("attestations %q: want %s, %s or %s", s, Carry, Refuse, Drop)
}

// evidence is what signs or describes the source.
type evidence struct {
	src      transport.Source
	subjects []v1.Hash                  // that may be signed: index, images, attestations
	signed   []string                   // digests of what signs or describes a subject
	byImage  map[string][]v1.Descriptor // attestation manifests, by the digest of their image
	count    int                        // of all
}

// findEvidence looks for what signs or describes images, and reports what else
// the source has as left out.
func (c *conversion) findEvidence(ctx context.Context, src transport.Source, images []input, report *Report) (*evidence, error) {
	e := &evidence{src: src, byImage: make(map[string][]v1.Descriptor)}
	for _, s := range src.Skipped() {
		of := slices.ContainsFunc(images, func(i input) bool { return s.Of != "" && i.Digest == s.Of })
		if !of {
			c.leaveOut(report, s.Digest, s.Reason)
			continue
		}
		e.byImage[s.Of] = append(e.byImage[s.Of], s.Descriptor)
		e.subjects = append(e.subjects, s.Descriptor.Digest)
		e.count++
	}
	stored, ok := src.(transport.Stored)
	if !ok {
		return e, nil
	}
	e.subjects = append(e.subjects, stored.Root().Digest)
	for _, i := range images {
		if h, err := v1.NewHash(i.Digest); err == nil && h != stored.Root().Digest {
			e.subjects = append(e.subjects, h)
		}
	}
	var err error
	if e.signed, err = transport.Attached(ctx, src, e.subjects); err != nil {
		if ctx.Err() != nil || c.o.Attestations == Refuse {
			return nil, in(Source, err)
		}
		c.o.Log.Warn(fmt.Sprintf("whether the source is signed cannot be told: %v", err))
		report.Skipped = append(report.Skipped, fmt.Sprintf("signatures, if there are any (%v)", err))
		e.subjects, e.signed = nil, nil
	}
	e.count += len(e.signed)
	return e, nil
}

func (c *conversion) leaveOut(report *Report, digest, reason string) {
	report.Skipped = append(report.Skipped, fmt.Sprintf("%s (%s)", digest, reason))
	c.o.Log.Info(fmt.Sprintf("left out: %s (%s)", digest, reason))
}

// refused is the error of Refuse.
func (e *evidence) refused() error {
	if e.count == 0 {
		return nil
	}
	return in(Source, fmt.Errorf("the source has %d attestations or signatures; carry them over or drop them with --attestations", e.count))
}

// drop reports all of it as left out.
func (e *evidence) drop(c *conversion, report *Report) {
	for _, image := range slices.Sorted(maps.Keys(e.byImage)) {
		for _, d := range e.byImage[image] {
			c.leaveOut(report, d.Digest.String(), "attestation")
		}
	}
	for _, s := range e.signed {
		c.leaveOut(report, s, "signature of the source, or the like")
	}
	e.byImage, e.subjects, e.signed = nil, nil, nil
}

// carry writes all of it to the destination, whose index will list the
// attestation manifests.
func (e *evidence) carry(ctx context.Context, c *conversion, report *Report) error {
	for _, image := range slices.Sorted(maps.Keys(e.byImage)) { // an archive has them in this order
		of := e.byImage[image]
		if err := transport.CopyManifests(ctx, e.src, c.dest, of); err != nil {
			return err
		}
		for _, d := range of {
			report.Attestations = append(report.Attestations, d.Digest.String())
		}
	}
	if len(e.signed) > 0 {
		done, err := transport.CopyAttached(ctx, e.src, c.dest, e.subjects)
		if err != nil {
			return err
		}
		report.Signatures = done
		c.o.Log.Info(fmt.Sprintf("%d signatures and the like came along: they hold for the source, the converted image is to be signed itself", len(done)))
	}
	if n := len(report.Attestations); n > 0 {
		c.o.Log.Info(fmt.Sprintf("%d attestations of the source came along", n))
		slices.Sort(report.Attestations)
	}
	return nil
}

// treatEvidence finds what signs or describes the source and does what can be
// done about it before the conversion.
func (c *conversion) treatEvidence(ctx context.Context, src transport.Source, images []input, report *Report) (*evidence, error) {
	e, err := c.findEvidence(ctx, src, images, report)
	if err != nil {
		return nil, err
	}
	switch {
	case c.o.Attestations == Refuse:
		return e, e.refused()
	case c.o.Attestations == Drop:
		e.drop(c, report)
	case e.count > 0 && !c.o.Destination.HoldsPacks():
		c.o.Log.Warn(fmt.Sprintf("%s cannot hold the source's %d attestations and signatures: they are left out", c.o.Destination, e.count))
		e.drop(c, report)
	}
	return e, nil
}
