package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// attachment is a manifest that signs or describes another one.
type attachment struct {
	desc v1.Descriptor
	// tag is the name that it is found under; "" for a referrer, which names
	// its subject itself.
	tag string
}

// cosignSuffixes end the tags that cosign gives to what belongs to a digest.
var cosignSuffixes = []string{".sig", ".att", ".sbom"}

// subjectTag is the tag that names a digest: cosign puts its suffixes behind it,
// and registries without a referrers API keep the list of referrers there.
func subjectTag(d v1.Hash) string { return d.Algorithm + "-" + d.Hex }

// maxReferrers bounds how many referrers of one manifest are followed.
const maxReferrers = 200

// describe makes a descriptor of a manifest's bytes.
func describe(raw []byte, mediaType string) (v1.Descriptor, error) {
	h, n, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return v1.Descriptor{}, err
	}
	var f manifestFields
	if err := json.Unmarshal(raw, &f); err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{MediaType: f.MediaType, Size: n, Digest: h}
	if d.MediaType == "" {
		d.MediaType = types.MediaType(mediaType)
	}
	return d, nil
}

// referrersOf are those that an index lists, as the referrers API and the
// fallback tag have it.
func referrersOf(raw []byte) ([]attachment, error) {
	list, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	if len(list.Manifests) > maxReferrers {
		return nil, fmt.Errorf("it lists %d, at most %d are followed", len(list.Manifests), maxReferrers)
	}
	var out []attachment
	for _, d := range list.Manifests {
		out = append(out, attachment{desc: d})
	}
	return out, nil
}

// attached asks a registry, which may not know of referrers.
func (s *registrySource) attached(ctx context.Context, subject v1.Hash) ([]attachment, error) {
	var out []attachment
	for _, suffix := range cosignSuffixes {
		tag := subjectTag(subject) + suffix
		d, err := s.tagged(ctx, tag)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("tag %s: %w", tag, s.explain(err))
		}
		out = append(out, attachment{d, tag})
	}
	a, err := s.client.get(ctx, s.client.at("referrers/"+subject.String()), []string{string(types.OCIImageIndex)})
	var raw []byte
	if err == nil && strings.HasPrefix(a.Header.Get("Content-Type"), string(types.OCIImageIndex)) {
		raw = []byte(a.text)
	} else if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	} else {
		// What registries without the API answer is of all kinds.
		switch found, err := s.client.has(ctx, "manifests/"+subjectTag(subject)); {
		case err != nil:
			return nil, s.explain(err)
		case !found:
			return out, nil
		}
		if raw, err = s.client.manifest(ctx, subjectTag(subject)); err != nil {
			return nil, s.explain(err)
		}
	}
	more, err := referrersOf(raw)
	if err != nil {
		return nil, fmt.Errorf("referrers of %s: %w", subject, err)
	}
	return append(out, more...), nil
}

// tagged looks before it reads: registries count what is read.
func (s *registrySource) tagged(ctx context.Context, tag string) (v1.Descriptor, error) {
	ok, err := s.client.has(ctx, "manifests/"+tag)
	if err == nil && !ok {
		err = fs.ErrNotExist
	}
	if err != nil {
		return v1.Descriptor{}, err
	}
	a, err := s.client.get(ctx, s.client.at("manifests/"+tag), manifestTypes)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return describe([]byte(a.text), a.Header.Get("Content-Type"))
}

// attached looks into the layout's index: for names as in a registry, and for
// manifests without a name whose subject it is.
func (r *resolved) attached(ctx context.Context, subject v1.Hash) ([]attachment, error) {
	var out []attachment
	for _, suffix := range cosignSuffixes {
		tag := subjectTag(subject) + suffix
		if d, ok := r.beside.lookup(tag); ok {
			d.Annotations = nil
			out = append(out, attachment{d, tag})
		}
	}
	if d, ok := r.beside.lookup(subjectTag(subject)); ok {
		raw, err := r.Manifest(ctx, d)
		if err != nil {
			return nil, err
		}
		list, err := referrersOf(raw)
		if err != nil {
			return nil, fmt.Errorf("referrers of %s: %w", subject, err)
		}
		out = append(out, list...)
	}
	for i, d := range r.beside.unnamed() {
		if i == maxReferrers || slices.ContainsFunc(out, func(a attachment) bool { return a.desc.Digest == d.Digest }) {
			continue
		}
		if raw, err := r.Manifest(ctx, d); err == nil && subjectOf(raw) == subject {
			out = append(out, attachment{desc: d})
		}
	}
	return out, nil
}

// subjectOf is the digest that a manifest says it refers to, or none.
func subjectOf(raw []byte) v1.Hash {
	var m struct {
		Subject *v1.Descriptor `json:"subject"`
	}
	if json.Unmarshal(raw, &m) != nil || m.Subject == nil {
		return v1.Hash{}
	}
	return m.Subject.Digest
}
