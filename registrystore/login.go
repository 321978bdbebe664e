package registrystore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// session is how the registry wants to be spoken to: by which scheme, and with
// which credentials. Until the registry asks for some there are none.
type session struct {
	scheme string
	login  string // Authorization header, "" for none

	// challenge is how the registry asked, for when it refuses the login one day
	// without asking again; nil before the first time.
	challenge *transport.Challenge
}

// wantsLogin tells an answer that a new session may change: one that asks for
// credentials or refuses those it got, which some registries do with 403, and
// the 400 of a TLS server that was spoken to in plain HTTP.
func (r *remoteBlobs) wantsLogin(s *session, resp *http.Response) bool {
	if resp.Request.URL.Host != r.endpoint.Host {
		return false
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return true
	case http.StatusBadRequest:
		return s.scheme == "http"
	}
	return false
}

// renew replaces session old, which got the answer refused, by a new one.
func (r *remoteBlobs) renew(ctx context.Context, old *session, refused *http.Response) error {
	_, err := r.session.Renew(ctx, old, func(ctx context.Context) (*session, error) {
		return r.handshake(ctx, old, refused)
	})
	return err
}

func (r *remoteBlobs) handshake(ctx context.Context, old *session, refused *http.Response) (*session, error) {
	challenge, err := r.challenge(ctx, old, refused)
	if err != nil {
		return nil, err
	}
	s := &session{scheme: "https", challenge: challenge}
	if challenge.Insecure {
		s.scheme = "http"
	}
	auth, err := authn.Resolve(ctx, r.keychain, r.repo)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", r.endpoint.Host, err)
	}
	known, err := authn.Authorization(ctx, auth)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", r.endpoint.Host, err)
	}
	switch {
	case known.RegistryToken != "":
		s.login = "Bearer " + known.RegistryToken
	case strings.EqualFold(challenge.Scheme, "bearer"):
		scope := cmp.Or(challenge.Parameters["scope"], r.repo.Scope(transport.PullScope))
		token, err := transport.Exchange(ctx, r.repo.Registry, auth, r.base, []string{scope}, challenge)
		var status *transport.Error
		var broken *url.Error
		switch {
		case errors.As(err, &status), errors.As(err, &broken):
			return nil, err
		case err != nil: // it may quote the answer
			return nil, fmt.Errorf("login at %s: %s", r.endpoint.Host, httpio.OneLine(err.Error(), maxWords))
		}
		s.login = "Bearer " + cmp.Or(token.AccessToken, token.Token)
	case known.Username != "" || known.Password != "":
		var req http.Request
		req.Header = make(http.Header)
		req.SetBasicAuth(known.Username, known.Password)
		s.login = req.Header.Get("Authorization")
	}
	return s, nil
}

// challenge returns what the registry asks for: in the answer that it just gave,
// else when it asked last, else when it is asked what it wants.
func (r *remoteBlobs) challenge(ctx context.Context, old *session, refused *http.Response) (*transport.Challenge, error) {
	switch {
	case refused.StatusCode == http.StatusUnauthorized && refused.Header.Get("WWW-Authenticate") != "":
		return transport.Ping(ctx, r.repo.Registry, answered{refused})
	case refused.StatusCode == http.StatusForbidden && old.challenge != nil:
		return old.challenge, nil
	}
	return transport.Ping(ctx, r.repo.Registry, r.base)
}

// answered gives an answer that has come already.
type answered struct{ resp *http.Response }

func (a answered) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: a.resp.StatusCode, Header: a.resp.Header, Body: http.NoBody, Request: a.resp.Request}, nil
}
