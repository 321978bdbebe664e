package faultproxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
)

// tokens is the token server of a registry.
type tokens struct {
	user, password string
	uses           int           // that a token has; 0 is no limit
	lifetime       time.Duration // of a token; 0 is no limit
	expired        int           // status that an expired token gets

	mu     sync.Mutex // guards what follows
	issued int
	valid  map[string]*token
}

type token struct {
	uses int // that it has had
	ends time.Time
}

// RequireToken makes the proxy ask for a bearer token, which its own token
// server gives to user with password. A token expires after uses requests;
// then the proxy answers with the given status: 401, or 403 as some do.
func (p *Proxy) RequireToken(user, password string, uses, expired int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens = &tokens{user: user, password: password, uses: uses, expired: expired, valid: make(map[string]*token)}
}

// RequireTokenFor is RequireToken with tokens that expire a lifetime after they
// were given.
func (p *Proxy) RequireTokenFor(user, password string, lifetime time.Duration, expired int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens = &tokens{user: user, password: password, lifetime: lifetime, expired: expired, valid: make(map[string]*token)}
}

// TokensIssued returns how many tokens the token server has given.
func (p *Proxy) TokensIssued() int {
	p.mu.Lock()
	t := p.tokens
	p.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issued
}

// admit answers the request itself unless it has a valid token.
func (t *tokens) admit(w http.ResponseWriter, r *http.Request) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.URL.Path == "/token" {
		if user, password, ok := r.BasicAuth(); !ok || user != t.user || password != t.password {
			w.WriteHeader(http.StatusUnauthorized)
			return false
		}
		t.issued++
		name := fmt.Sprintf("token-%d", t.issued)
		t.valid[name] = &token{ends: time.Now().Add(t.lifetime)}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"token": name})
		return false
	}
	name, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if known := t.valid[name]; known != nil && (t.uses == 0 || known.uses < t.uses) && (t.lifetime == 0 || time.Now().Before(known.ends)) {
		known.uses++
		return true
	}
	if bearer && t.expired == http.StatusForbidden {
		w.WriteHeader(http.StatusForbidden)
		return false
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s://%s/token",service="registry"`, scheme, r.Host))
	w.WriteHeader(http.StatusUnauthorized)
	return false
}
